from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema_rs
import pytest

from support import GOLDEN, until
from vramd.worker import protocol
from vramd.worker.channel import Channel
from vramd.worker.instructor import Instructor
from vramd.worker.protocol import Call, Refused

CASES: list[dict[str, Any]] = json.loads((GOLDEN / "worker" / "lines.json").read_text())
SCHEMA = json.loads((GOLDEN.parent / "worker.schema.json").read_text())
GOOD = [case for case in CASES if "fault" not in case]
BAD = [case for case in CASES if "fault" in case]


def name(case: dict[str, Any]) -> str:
    return str(case["name"])


@pytest.mark.parametrize("case", [case for case in GOOD if case["from"] == "daemon"], ids=name)
def test_requests_read_as_listed(case: dict[str, Any]) -> None:
    call = protocol.decode(case["line"].encode())
    message = case["message"]
    assert (call.request_id, call.action, call.data) == (
        message["request_id"],
        message["action"],
        message["data"],
    )
    assert (call.deadline is None) == ("deadline_ms" not in message)


@pytest.mark.parametrize("case", [case for case in GOOD if case["from"] == "worker"], ids=name)
def test_replies_and_events_are_written_to_the_byte(case: dict[str, Any]) -> None:
    message = case["message"]
    if "event" in message:
        built = protocol.event(message["event"], message["data"])
    elif message["success"]:
        built = protocol.reply(message["request_id"], message["data"])
    else:
        error = message["error"]
        refused = Refused(error["code"], error["message"], error.get("hint"))
        built = protocol.failure(message["request_id"], refused)
    assert protocol.encode(built) == case["line"].encode()


@pytest.mark.parametrize("case", [case for case in BAD if case["from"] == "daemon"], ids=name)
def test_what_is_no_request_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        protocol.decode(case["line"].encode())


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_schema_takes_what_is_good_and_nothing_else(case: dict[str, Any]) -> None:
    schema = jsonschema_rs.validator_for(SCHEMA)
    try:
        message = json.loads(case["line"], parse_constant=pytest.fail)
    except (ValueError, pytest.fail.Exception):
        assert "fault" in case
        return
    assert schema.is_valid(message) == ("fault" not in case)


class Wire(Channel):
    """A channel whose lines come from the test, which reads its answers; it ends when all are there."""

    def __init__(self, *requests: dict[str, Any] | Callable[[], object], answers: int) -> None:
        super().__init__(io.BytesIO(), self._take, lambda: None)
        self.sent: list[dict[str, Any]] = []
        self._requests = requests
        self._answers = answers

    def _take(self, line: bytes) -> None:
        self.sent.append(json.loads(line))

    def lines(self) -> Iterator[bytes]:
        for request in self._requests:
            if isinstance(request, dict):
                yield protocol.encode(request)
            else:
                request()
        until(lambda: len(self.sent) == self._answers, "an answer to each")


def request(request_id: str, action: str, **data: Any) -> dict[str, Any]:
    return {"request_id": request_id, "action": action, "data": data}


def test_each_request_has_one_answer_and_a_long_one_holds_up_nobody() -> None:
    begun, release = threading.Event(), threading.Event()

    def slow(call: Call) -> dict[str, Any]:
        begun.set()
        while not release.wait(0.001):
            call.check()
        return {}

    def broken(call: Call) -> dict[str, Any]:
        raise KeyError("what a library raises")

    requests: list[dict[str, Any] | Callable[[], object]] = [
        request("1", "slow"),
        request("2", "ping"),
        request("3", "broken"),
        request("4", "nothing"),
        begun.wait,
        {"request_id": "1", "action": "cancel", "data": {}},
        {"request_id": "9", "action": "cancel", "data": {}},
        {"request_id": "5", "action": "slow", "data": {}, "deadline_ms": 0},
    ]
    wire = Wire(*requests, answers=5)
    Instructor(wire, {"ping": lambda call: {}}, {"slow": slow, "broken": broken}).run()
    answers = {answer["request_id"]: answer for answer in wire.sent}
    assert answers["2"] == {"request_id": "2", "success": True, "data": {}}
    assert answers["1"]["error"]["code"] == "CANCELLED"
    assert answers["3"]["error"]["code"] == "KeyError"
    assert answers["4"]["error"]["code"] == "INVALID_ARGUMENT"
    assert answers["5"]["error"]["code"] in ("TIMEOUT", "CANCELLED")
    assert begun.is_set()


def test_figures_are_checked_where_they_are_read() -> None:
    call = Call(
        "1",
        "memory.allocate",
        {"size_mb": -1, "name": "", "flag": 1, "names": [1], "nan": float("nan")},
        None,
    )
    for read in (
        lambda: call.number("size_mb"),
        lambda: call.number("missing"),
        lambda: call.number("nan"),
        lambda: call.number("flag" * 2),
        lambda: call.text("name"),
        lambda: call.texts("names"),
        lambda: call.flag("flag"),
    ):
        with pytest.raises(Refused) as refused:
            read()
        assert refused.value.code == "INVALID_ARGUMENT"
        assert refused.value.message.startswith("memory.allocate takes")
    assert call.number("missing", 3) == 3.0
    assert call.optional_text("missing") is None


def test_an_answer_beyond_the_longest_line_is_refused() -> None:
    wire = Wire(request("1", "much"), answers=1)
    Instructor(wire, {}, {"much": lambda call: {"text": "x" * protocol.MAX_LINE_BYTES}}).run()
    assert wire.sent[0]["error"]["code"] == "PAYLOAD_TOO_LARGE"
