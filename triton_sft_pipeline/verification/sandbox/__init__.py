"""Shuts processes in that run code of others, and looks after them: the zygote, its children and their walls."""
