"""What a kernel's process answers, asked over its socket in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from triton_sft_pipeline.verification.lanes import Lane
from triton_sft_pipeline.verification.peer import Clock, Peer, Share
from triton_sft_pipeline.verification.wire import Array
from triton_sft_pipeline_tests.verification.peers import array, numbers
from triton_sft_pipeline_tests.verification.snippets import CALL, DOUBLE_KERNEL, HEADER, LAUNCH, kernel, pointwise

FORWARD = {"input_count": 1, "input_names": ("x",), "parameters": (), "buffers": (), "module_weights": ()}


class Session:
    """A fresh kernel's process."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        return self._peer.ask(do, Clock(20.0), 1 << 20, **fields)

    def load(self, code: str, binding: int = 0, init_inputs: Any = None, **fields: Any) -> dict[str, Any]:
        state = {"tensors": fields.pop("tensors", {}), "state_dict": fields.pop("state_dict", ())}
        available = FORWARD | fields
        return self.ask("load", code=code, state=state, available=available, init_inputs=init_inputs, binding=binding)

    def call(self, *inputs: Any, reuse: bool = False, sizes: tuple[int, ...] = ()) -> dict[str, Any]:
        return self.ask("call", inputs=inputs, reuse=reuse, sizes=sizes)

    def ablate(self, *inputs: Any, sizes: tuple[int, ...] = ()) -> dict[str, Any]:
        return self.ask("ablate", inputs=inputs, sizes=sizes)


@pytest.fixture
def session(lane: Lane) -> Iterator[Session]:
    with lane.kernel() as peer:
        yield Session(peer)


X = array([1.0, -2.0, 3.0])
Y = array([4.0, 5.0, -6.0])


def test_a_kernel_is_loaded_called_and_asked_again(session: Session) -> None:
    assert session.load(DOUBLE_KERNEL) == {"contract": "name", "bindings": 1}
    first, second = session.call(X), session.call(Y, reuse=True)
    assert numbers(first["output"]).tolist() == [2.0, -4.0, 6.0]
    assert numbers(second["output"]).tolist() == [8.0, 10.0, -12.0]
    recalled = session.ask("recall")
    assert set(recalled) == {"output"} and numbers(recalled["output"]).tolist() == [2.0, -4.0, 6.0]


def test_a_call_tells_what_was_done_in_it(session: Session) -> None:
    session.load(kernel(f"y = torch.empty_like(x)\n{LAUNCH}\n{LAUNCH}\nreturn y + 1, x.clone(), x"))
    answer = session.call(X)
    assert set(answer) == {
        *("output", "inputs", "arguments", "aliases", "launches", "side_launches"),
        *("compute", "copy", "scalars", "operators"),
    }
    assert (answer["launches"], answer["compute"], answer["copy"], answer["scalars"]) == (2, 3.0, 3.0, 0)
    assert answer["aliases"] == (2,)
    assert answer["inputs"] is None and answer["arguments"] == ()
    assert answer["operators"] == ("aten.add",)
    assert session.call(X)["launches"] == 2


def test_inputs_that_were_written_to_come_back(session: Session) -> None:
    session.load(kernel(f"y = x\n{LAUNCH}\nreturn y"))
    answer = session.call(X)
    assert numbers(answer["inputs"][0]).tolist() == [2.0, -4.0, 6.0]
    assert answer["aliases"] == (0,)


def test_nan_in_an_input_is_no_sign_of_writing(session: Session) -> None:
    session.load(DOUBLE_KERNEL)
    assert session.call(array([math.nan, math.inf, 1.0]))["inputs"] is None


def test_memory_that_nothing_has_written_holds_nan(session: Session) -> None:
    session.load(kernel(f"y = torch.empty_like(x)\n{LAUNCH}\nreturn torch.empty(2), y"))
    hollow, output = session.call(X)["output"]
    assert all(map(math.isnan, numbers(hollow))) and numbers(output).tolist() == [2.0, -4.0, 6.0]


WATCHED = """
SEEN = []

def triton_kernel_wrapper(x):
    SEEN.append(x)
    y = torch.empty_like(x)
    pointwise[(1,)](x, y, x.numel(), BLOCK=32)
    same = torch.tensor([float(x.data_ptr() == other.data_ptr()) for other in SEEN])
    return y, same
"""


def test_new_values_come_in_the_old_tensors_when_that_is_asked_for_and_possible(session: Session) -> None:
    session.load(pointwise("x * 2") + WATCHED)
    session.call(X)
    output, same = session.call(Y, reuse=True)["output"]
    assert numbers(output).tolist() == [8.0, 10.0, -12.0] and numbers(same).tolist() == [1.0, 1.0]
    _, same = session.call(Y, reuse=False)["output"]
    assert numbers(same).tolist() == [0.0, 0.0, 1.0]
    for other in (array([1.0, 2.0]), array([1, 2, 3], "int32"), Array("float32", (3,), X.data[:4], (0,))):
        output, same = session.call(other, reuse=True)["output"]
        assert numbers(same).tolist()[:2] == [0.0, 0.0]
        assert len(numbers(output)) == other.shape[0]


PREPARED = kernel(f"z = x * 2\ny = torch.empty_like(x)\npointwise[(1,)](z, y, 3, BLOCK=32)\n{LAUNCH}\nreturn y")


def test_arguments_of_the_first_launch_are_sent_as_they_were_before_it(session: Session) -> None:
    session.load(PREPARED)
    assert session.call(X)["arguments"] == ()
    assert session.call(X, sizes=(4,))["arguments"] == ()
    prepared, hollow = session.call(X, sizes=(3,))["arguments"]
    assert numbers(prepared).tolist() == [2.0, -4.0, 6.0]
    assert all(map(math.isnan, numbers(hollow)))


def test_inputs_and_weights_are_no_arguments_to_be_looked_at(session: Session) -> None:
    code = kernel(f"x = x.view(3)\ny = w\n{LAUNCH}\nreturn y.clone()", signature="x, w")
    session.load(code, tensors={"w": array([0.0] * 3)}, parameters=("w",))
    assert session.call(X, sizes=(3,))["arguments"] == ()


def test_without_kernels_nothing_is_computed_and_all_launches_are_looked_at(session: Session) -> None:
    session.load(PREPARED)
    session.call(X)
    answer = session.ablate(X, sizes=(3,))
    assert all(map(math.isnan, numbers(answer["output"])))
    assert [numbers(item).tolist() for item in answer["arguments"][::3]] == [[2.0, -4.0, 6.0]]
    assert len(answer["arguments"]) == 3
    assert numbers(session.call(X)["output"]).tolist() == [2.0, -4.0, 6.0]


def test_whatever_happens_without_kernels_is_no_fault(session: Session) -> None:
    body = f"y = torch.empty_like(x)\n{LAUNCH}\nif y.isnan().any():\n    raise SystemExit(3)\nreturn y"
    session.load(kernel(body))
    assert session.ablate(X) == {"raised": "SystemExit", "arguments": ()}
    assert numbers(session.call(X)["output"]).tolist() == [2.0, -4.0, 6.0]


FAILURES = {
    "syntax": ("def f(:\n", "runtime_error", "SyntaxError"),
    "import": ("import no_such_module\n" + DOUBLE_KERNEL, "import_error", "no_such_module"),
    "raises": (DOUBLE_KERNEL + "\nraise KeyError('at import')\n", "runtime_error", "at import"),
    "exits": (DOUBLE_KERNEL + "\nraise SystemExit(0)\n", "early_exit", "SystemExit"),
    "nothing defined": (HEADER + "x = 1\n", "contract_error", "Neither"),
    "too many parameters": (kernel(CALL, signature="x, a, b, c"), "contract_error", "1 inputs"),
    "not callable": (HEADER + "triton_kernel_wrapper = 3\n", "runtime_error", "not a callable"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_code_that_cannot_be_loaded_says_why(session: Session, name: str) -> None:
    code, verdict, mentioned = FAILURES[name]
    answer = session.load(code)
    assert answer["verdict"] == verdict and mentioned in answer["detail"]
    assert session.call(X)["verdict"] == "contract_error"


def test_a_call_that_fails_says_where_and_the_next_may_succeed(session: Session) -> None:
    session.load(kernel(f"if x.sum() > 10:\n    raise ValueError('too much')\n{CALL}"))
    answer = session.call(array([20.0]))
    assert answer["verdict"] == "runtime_error"
    assert "too much" in answer["detail"] and "of kernel.py" in answer["detail"]
    assert numbers(session.call(X)["output"]).tolist() == [2.0, -4.0, 6.0]


def test_an_output_that_cannot_travel_is_no_plain_tensor(session: Session) -> None:
    session.load(kernel(f"{CALL.replace('return y', 'return [y, object()]')}"))
    answer = session.call(X)
    assert answer["verdict"] == "lazy_output" and "type object" in answer["detail"]


def test_weights_are_bound_by_name_and_every_binding_can_be_chosen(session: Session) -> None:
    code = (
        pointwise("x * 2") + "\ndef triton_kernel_wrapper(x, weight, bias):\n    return weight.clone(), bias.clone()\n"
    )
    weights = {"fc.weight": array([1.0]), "fc.bias": array([2.0])}
    names: dict[str, Any] = {"parameters": ("fc.bias", "fc.weight"), "module_weights": ("fc.weight", "fc.bias")}
    assert session.load(code, tensors=weights, **names) == {"contract": "name", "bindings": 2}
    assert [float(numbers(item)[0]) for item in session.call(X)["output"]] == [1.0, 2.0]
    assert session.load(code, binding=1, tensors=weights, **names)["contract"] == "v1"
    assert [float(numbers(item)[0]) for item in session.call(X)["output"]] == [2.0, 1.0]
    assert session.load(code, binding=9, tensors=weights, **names)["contract"] == "v1"


MODEL = """
class ModelNew(torch.nn.Module):
    def __init__(self, scale, offset=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1,), scale + offset))
        self.drawn = float(torch.rand(1))

    def forward(self, x):
        y = torch.empty_like(x)
        pointwise[(1,)](x, y, x.numel(), BLOCK=32)
        return y, self.weight.clone(), torch.tensor(self.drawn)
"""


def test_a_module_of_its_own_gets_the_references_arguments_and_weights(session: Session) -> None:
    code = pointwise("x * 2") + MODEL
    weights: dict[str, Any] = {"tensors": {"weight": array([7.0])}, "state_dict": ("weight",)}
    answer = session.load(code, init_inputs=((2.0,), {"offset": 1.0}), **weights)
    assert answer == {"contract": "ModelNew", "bindings": 1}
    output, weight, drawn = session.call(X)["output"]
    assert numbers(output).tolist() == [2.0, -4.0, 6.0] and numbers(weight).tolist() == [7.0]
    # Constants that are drawn are the same as the reference's: both start from the same seed.
    session.load(code, init_inputs=((2.0,), {}), **weights)
    assert numbers(session.call(X)["output"][2]) == numbers(drawn)


def test_a_module_that_does_not_take_the_weights_breaks_the_contract(session: Session) -> None:
    code = pointwise("x * 2") + MODEL
    other: dict[str, Any] = {"tensors": {"other": array([7.0])}, "state_dict": ("other",)}
    answer = session.load(code, init_inputs=((2.0,), {}), **other)
    assert answer["verdict"] == "contract_error" and "state_dict" in answer["detail"]
    assert session.load(code, init_inputs=None, **other)["verdict"] == "contract_error"


SUSPICIOUS = {
    "a patched function": ("torch.allclose = lambda *args, **kwargs: True", "harness_tamper", "torch.allclose"),
    "a thread that ended": (
        "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()",
        "thread_leak",
        "thread",
    ),
    "a process that runs": ("import os\nif os.fork() == 0:\n    os.read(os.pipe()[0], 1)", "process_leak", "process"),
}


@pytest.mark.parametrize("name", SUSPICIOUS)
def test_reaching_for_more_than_its_work_is_seen_at_import_and_at_the_end(
    session: Session, lane: Lane, name: str
) -> None:
    act, verdict, mentioned = SUSPICIOUS[name]
    answer = session.load(DOUBLE_KERNEL + f"\n{act}\n")
    assert answer["verdict"] == verdict and mentioned in answer["detail"]
    with lane.kernel() as peer:
        other = Session(peer)
        assert "verdict" not in other.load(kernel(f"{act}\n{CALL}"))
        assert numbers(other.call(X)["output"]).tolist() == [2.0, -4.0, 6.0]
        assert other.ask("recall")["verdict"] == verdict


def test_switching_off_what_watches_the_operators_is_seen(session: Session) -> None:
    off = "from torch.utils._python_dispatch import _pop_mode\n_pop_mode()\n"
    session.load(kernel(f"{off}{CALL}"))
    assert session.call(X)["verdict"] == "harness_tamper"


PLACES = {3: array([2, 0], "int64")}


def test_of_large_arguments_a_few_elements_are_sent_and_all_on_demand(session: Session) -> None:
    session.load(kernel(f"y = torch.full_like(x, 7.0)\ny[0] = 5.0\n{LAUNCH}\nreturn y"))
    answer = session.ask("call", inputs=(X,), reuse=False, sizes=(3,), places=PLACES)
    assert numbers(answer["output"]).tolist() == [2.0, -4.0, 6.0]
    ((size, few),) = answer["arguments"]
    assert size == 3 and numbers(few).tolist() == [7.0, 5.0]
    whole = session.ask("whole")
    assert set(whole) == {"arguments"} and numbers(whole["arguments"][0]).tolist() == [5.0, 7.0, 7.0]
    assert session.ask("whole") == {}


def test_without_kernels_a_few_elements_of_the_output_are_sent_and_all_on_demand(session: Session) -> None:
    session.load(kernel(f"y = torch.full_like(x, 7.0)\n{LAUNCH}\nreturn y, y[:2] + 1"))
    answer = session.ask("ablate", inputs=(X,), sizes=(3, 2), places=PLACES)
    large, small = answer["output"]
    assert numbers(large).tolist() == [7.0, 7.0] and numbers(small).tolist() == [8.0, 8.0]
    assert answer["arguments"][0][0] == 3
    whole = session.ask("whole")
    assert numbers(whole["output"][0]).tolist() == numbers(whole["arguments"][0]).tolist() == [7.0, 7.0, 7.0]
    # The next question makes it forget.
    session.ask("ablate", inputs=(X,), sizes=(3,), places=PLACES)
    session.call(X)
    assert session.ask("whole") == {}


def test_moving_megabytes_is_not_the_kernels_time(session: Session) -> None:
    session.load(kernel("time.sleep(0.3)\nreturn x", prelude="import time"))
    large = array(np.ones(1 << 19))
    clock = Clock(20.0, 20.0)
    assert session._peer.ask("call", clock, 1 << 24, inputs=(large,), reuse=False)["output"].shape == (1 << 19,)
    left = clock._left
    assert left[Share.KERNEL] <= 19.7 and left[Share.MOVING] < 20.0
