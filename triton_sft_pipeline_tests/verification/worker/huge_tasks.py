"""A reference's task for which inputs of a few hundred bytes are as large as gigabytes are for the real one."""

from __future__ import annotations

import socket

from triton_sft_pipeline.verification.worker import problem_code, reference_session

HUGE_BYTES = 128


def reference(sock: socket.socket, backend: str) -> None:
    """Serve as `reference_session` does."""
    problem_code._MAX_INPUT_BYTES = HUGE_BYTES
    reference_session._MAX_DERIVED_BYTES = HUGE_BYTES // 2
    reference_session.serve(sock, backend)
