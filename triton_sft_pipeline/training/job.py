"""What the process that starts a training on several GPUs and its workers agree on: a module, and files of a directory.

job.json says what to train, events.jsonl takes what is told on the way (one JSON object a line, from any of the
processes), result.json what came out, and a file named `stop` asks for an end after the current step.
"""

from __future__ import annotations

MODULE = "triton_sft_pipeline.training.worker"
"""What is run as a process of its own."""

JOB, EVENTS, RESULT, STOP = "job.json", "events.jsonl", "result.json", "stop"
