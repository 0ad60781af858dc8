"""Everything between a chat dataset and an adapter: presets' settings, the base model in 4 bits, LoRA, the trainer.

Knows the format of the chat dataset and nothing of traces, kernels or orchestration. Importing this package loads
nothing heavy.
"""
