"""The routed experts of a mixture: in 4 bits, with adapters, and the arithmetic of both."""
