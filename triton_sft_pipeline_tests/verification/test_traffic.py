"""Together and alone exclude each other, and nobody starves."""

from __future__ import annotations

import threading

from triton_sft_pipeline.verification.traffic import Traffic


def test_many_run_together() -> None:
    traffic = Traffic()
    barrier = threading.Barrier(3, timeout=10)

    def member() -> None:
        with traffic.together():
            barrier.wait()

    threads = [threading.Thread(target=member) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not barrier.broken


def test_whoever_is_alone_meets_nobody_and_goes_before_newcomers() -> None:
    traffic = Traffic()
    order: list[str] = []
    inside = threading.Event()
    release = threading.Event()

    def first() -> None:
        with traffic.together():
            inside.set()
            release.wait(10)
            order.append("first")

    def alone() -> None:
        with traffic.alone():
            order.append("alone")

    def newcomer() -> None:
        with traffic.together():
            order.append("newcomer")

    threads = [threading.Thread(target=first), threading.Thread(target=alone), threading.Thread(target=newcomer)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    with traffic._changed:
        traffic._changed.wait_for(lambda: traffic._waiting_alone == 1, timeout=10)
    threads[2].start()
    release.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "alone", "newcomer"]
