"""What runs in the judge's children: the kernel, its reference, and whatever watches and measures them.

Nothing here is trusted by the judge.
"""
