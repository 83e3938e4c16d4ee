"""A judge that misbehaves costs no row: what is missing is listed, and the next run asks for that alone."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_server import seen

from rlaifv.benchmarks.judge import (
    Judge,
    Request,
    ask_all,
    load_judge,
    open_judge,
    published_prompt,
)
from rlaifv.benchmarks.mmhal import parse_rating
from rlaifv.inference.server import NoReply, ServerRefused
from rlaifv.params import ServerParams

REQUESTS = [Request(f"row {i}", f"Rate this.\n### Answer of the assistant\n{'word ' * i}") for i in range(12)]


@pytest.fixture
def serve(start_server):
    """Start a judge with a habit; returns its address."""
    return lambda *habit: start_server("judge_server.py", *habit)


def ask(address, cache, give_up_after=2, **options):
    params = ServerParams(**{"tries": 2, "timeout": 20, "concurrency": 4} | options)
    return ask_all(REQUESTS, open_judge("rules", address, params, give_up_after=give_up_after), parse_rating, cache)


def test_every_row_gets_its_own_verdict_and_a_repeated_run_asks_nothing(serve, tmp_path):
    address, cache = serve("well"), tmp_path / "cache.jsonl"
    first = ask(address, cache)
    assert first.verdicts == {f"row {i}": i % 7 for i in range(12)}
    assert (first.missing, first.replied, first.cached, seen(address)["seen"]) == ([], 12, 0, 12)
    second = ask(address, cache)
    assert second.verdicts == first.verdicts
    assert (second.replied, second.cached, seen(address)["seen"]) == (0, 12, 12)


def test_the_cache_names_judge_prompt_hash_and_raw_reply_and_holds_no_key(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    cache = tmp_path / "cache.jsonl"
    ask(serve("well"), cache)
    rows = [json.loads(line) for line in cache.read_text().splitlines()]
    assert {row["judge"] for row in rows} == {"rules"}
    assert rows[3]["prompt_sha256"] == REQUESTS[3].digest and "Rating: 3" in rows[3]["reply"]
    assert "sk-very-secret" not in cache.read_text()


def test_a_judge_that_dies_half_way_leaves_the_list_and_the_next_run_asks_for_it_alone(serve, tmp_path):
    cache = tmp_path / "cache.jsonl"
    first = ask(serve("dying", 5), cache, tries=1, concurrency=1)
    assert len(first.verdicts) == 5
    assert {row["id"] for row in first.missing} == {r.id for r in REQUESTS} - set(first.verdicts)
    assert all("no reply" in row["reason"] for row in first.missing)
    assert "not asked after 2 failures" in first.missing[-1]["reason"]  # it is not asked to the bitter end
    address = serve("well")
    second = ask(address, cache)
    assert second.verdicts == {f"row {i}": i % 7 for i in range(12)}
    assert seen(address)["seen"] == second.replied == 7


def test_nonsense_is_asked_for_again_a_bounded_number_of_times_and_then_listed_never_scored(serve, tmp_path):
    address = serve("nonsense")
    result = ask(address, tmp_path / "cache.jsonl")
    assert result.verdicts == {}
    assert seen(address)["seen"] == 3 * len(REQUESTS)
    assert result.unparsed == [request.id for request in REQUESTS]
    assert "Lovely weather" in result.missing[0]["reason"]


def test_a_second_attempt_can_bring_a_readable_reply(serve, tmp_path):
    result = ask(serve("sometimes"), tmp_path / "cache.jsonl")
    assert len(result.verdicts) == 12
    assert result.replied == 24


def test_a_busy_server_is_waited_for(serve, tmp_path):
    address = serve("busy", 4)
    assert len(ask(address, None, tries=4, concurrency=2).verdicts) == 12
    assert seen(address)["seen"] == 16


@pytest.mark.parametrize(
    ("habit", "reason"),
    [("broken", "HTTP 500"), ("empty", "an empty reply"), ("html", "no chat completion")],
)
def test_a_server_without_useful_replies_is_described_row_by_row(serve, tmp_path, habit, reason):
    result = ask(serve(habit), tmp_path / "cache.jsonl", tries=1)
    assert result.verdicts == {}
    assert len(result.missing) == 12 and all(reason in row["reason"] for row in result.missing)


def test_a_judge_that_does_not_answer_in_time_is_given_up(serve, tmp_path):
    result = ask(serve("slow"), tmp_path / "cache.jsonl", tries=1, timeout=0.3)
    assert len(result.missing) == 12
    assert "Timeout" in result.missing[0]["reason"]


def test_an_unknown_model_stops_the_run_with_one_clear_line(serve, tmp_path):
    with pytest.raises(ServerRefused, match=r"the judge rules at http.* answers HTTP 404: .*no model rules"):
        ask(serve("unknown"), tmp_path / "cache.jsonl")


def test_no_server_at_all_is_listed_too(tmp_path):
    result = ask("http://127.0.0.1:9/v1", tmp_path / "cache.jsonl", tries=1)
    assert len(result.missing) == 12


def test_a_cache_that_was_cut_while_written_is_read_and_goes_on(serve, tmp_path):
    cache = tmp_path / "cache.jsonl"
    ask(serve("well"), cache)
    whole = cache.read_text()
    cache.write_text(whole[: len(whole) - 20])
    address = serve("well")
    assert ask(address, cache).replied == 1
    assert ask(address, cache).replied == 0


def test_another_judge_another_prompt_and_another_run_have_replies_of_their_own(tmp_path):
    asked = []

    def judge(name):
        return Judge(name, lambda requests: [asked.append((name, r.id)) or "Rating: 2" for r in requests])

    cache, request = tmp_path / "cache.jsonl", Request("row", "text")
    for name, text, run in [("a", "text", 0), ("b", "text", 0), ("a", "other", 0), ("a", "text", 1), ("a", "text", 0)]:
        ask_all([Request("row", text)], judge(name), parse_rating, cache, run=run)
    assert len(asked) == 4
    assert request.digest != Request("row", "", "text").digest


def test_a_judge_in_this_process_is_a_plain_callable_asked_in_batches(tmp_path):
    sizes = []

    def local(requests):
        sizes.append(len(requests))
        return [f"Rating: {len(request.text) % 7}" for request in requests]

    result = ask_all(REQUESTS, Judge("local", local, batch_size=5), parse_rating, tmp_path / "cache.jsonl")
    assert sizes == [5, 5, 2]
    assert len(result.verdicts) == 12


def test_failures_of_single_rows_do_not_touch_the_others():
    flaky = Judge("flaky", lambda rs: [NoReply("lost") if r.id == "row 3" else "Rating: 5" for r in rs])
    result = ask_all(REQUESTS, flaky, parse_rating)
    assert [dict(row) for row in result.missing] == [{"id": "row 3", "reason": "no reply: lost"}]


def test_rows_with_one_id_are_refused():
    with pytest.raises(ValueError, match="one id"):
        ask_all([Request("a", "x"), Request("a", "y")], Judge("j", lambda requests: []), parse_rating)


def test_a_published_prompt_is_read_without_running_its_file(tmp_path):
    path = tmp_path / "scorer.py"
    path.write_text("import missing_package\ntemplate = '''Rate {}.'''\nraise SystemExit\n")
    assert published_prompt(path, "template") == "Rate {}."
    with pytest.raises(ValueError, match="SYSTEM_MSG"):
        published_prompt(path, "SYSTEM_MSG")
    with pytest.raises(FileNotFoundError, match="fetch prompts"):
        published_prompt(tmp_path / "absent.py", "template")


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 3))
def test_verdicts_and_missing_rows_always_add_up(works, attempts):
    requests = [Request(str(i), f"text {i}") for i in range(len(works))]
    judge = Judge("j", lambda rs: ["Rating: 1" if works[int(r.id)] else "no idea" for r in rs])
    result = ask_all(requests, judge, parse_rating, attempts=attempts)
    assert len(result.verdicts) + len(result.missing) == len(works)
    assert result.replied == sum(works) + attempts * (len(works) - sum(works))


def test_a_model_of_this_machine_can_judge(tmp_path):
    from tiny_llava import save_tiny_llava

    judge = load_judge(str(save_tiny_llava(tmp_path / "model")), max_tokens=4, device="cpu")
    requests = [Request("a", "what is it ?"), Request("b", "describe it .", "there is a dog .")]
    replies = ask_all(requests, judge, lambda reply: reply, tmp_path / "cache.jsonl")
    assert set(replies.verdicts) | {row["id"] for row in replies.missing} == {"a", "b"}
    assert judge.name.startswith(str(tmp_path / "model") + "@")


def test_damaged_lines_of_the_cache_cost_only_their_own_replies(serve, tmp_path, caplog):
    cache = tmp_path / "cache.jsonl"
    ask(serve("well"), cache)
    lines = cache.read_bytes().splitlines(keepends=True)
    silent = json.dumps({**json.loads(lines[3]), "reply": None}).encode() + b"\n"
    cache.write_bytes(b"\xef\xbb\xbf" + b"".join(lines[:3]) + silent + b"\xff\xfe\n[1]\n" + lines[4][:40])
    address = serve("well")
    assert ask(address, cache).verdicts == {f"row {i}": i % 7 for i in range(12)}
    assert seen(address)["seen"] == 9
    (line,) = [r.getMessage() for r in caplog.records if r.name == "rlaifv.inference.server"]
    assert line == f"{cache}: 4 lines hold no reply; what they answered is asked again"


def test_a_row_that_the_server_cannot_take_costs_only_itself(serve, tmp_path):
    address = serve("picky", 3)  # HTTP 400 for a prompt of three words or more
    result = ask(address, tmp_path / "cache.jsonl", give_up_after=1)
    assert len(result.verdicts) == 3 and len(result.missing) == 9
    assert all("HTTP 400" in row["reason"] for row in result.missing), "nobody was left unasked"
