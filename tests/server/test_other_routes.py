"""Tests of text completions, tokens, status, metrics and origins on a served built-in model."""

import base64
import json
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlx_k2.builtin import BUILTIN_FOLDER
from tests.server.server_process import Server

METRICS = {
    "mlx_k2_num_requests_waiting": "gauge",
    "mlx_k2_num_requests_running": "gauge",
    "mlx_k2_restarts": "counter",
    "mlx_k2_faults": "counter",
    "mlx_k2_stage_held_bytes": "gauge",
    "mlx_k2_stage_faults": "counter",
    "mlx_k2_request_queue_time_seconds": "histogram",
    "mlx_k2_request_prefill_time_seconds": "histogram",
    "mlx_k2_stage_busy_seconds": "counter",
    "mlx_k2_stage_receive_seconds": "counter",
    "mlx_k2_stage_send_seconds": "counter",
    "mlx_k2_stage_peak_bytes": "gauge",
    "mlx_k2_stage_tokens": "counter",
    "mlx_k2_prompt_tokens": "counter",
    "mlx_k2_generation_tokens": "counter",
    "mlx_k2_prefix_cache_queries": "counter",
    "mlx_k2_prefix_cache_hits": "counter",
    "mlx_k2_spec_decode_num_draft_tokens": "counter",
    "mlx_k2_spec_decode_num_accepted_tokens": "counter",
    "mlx_k2_draft_tokens": "counter",
    "mlx_k2_accepted_draft_tokens": "counter",
    "mlx_k2_request_success": "counter",
    "mlx_k2_time_to_first_token_seconds": "histogram",
    "mlx_k2_inter_token_latency_seconds": "histogram",
    "mlx_k2_e2e_request_latency_seconds": "histogram",
    "mlx_k2_request_decode_time_seconds": "histogram",
    "mlx_k2_request_prompt_tokens": "histogram",
    "mlx_k2_request_generation_tokens": "histogram",
}


@pytest.mark.parametrize("fields", [{}, {"stop": ["a", "e"]}, {"max_tokens": 3}])
def test_a_streamed_text_completion_equals_the_body(server: Server, fields: dict[str, Any]) -> None:
    request: dict[str, Any] = {"model": "any", "prompt": "Count from 3", "temperature": 0, "max_tokens": 20} | fields
    body = server.client.completions.create(**request)
    chunks = list(server.client.completions.create(stream=True, **request))
    assert "".join(chunk.choices[0].text for chunk in chunks) == body.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == body.choices[0].finish_reason
    assert body.usage is not None
    assert body.usage.completion_tokens >= 1


def test_a_prompt_can_be_text_or_token_ids(server: Server) -> None:
    tokens = server.request("POST", "/tokenize", {"prompt": "Count from 3"}).json["tokens"]
    texts = {
        server.client.completions.create(model="any", prompt=prompt, temperature=0, max_tokens=5).choices[0].text
        for prompt in ("Count from 3", tokens, [tokens])
    }
    assert len(texts) == 1


def test_a_text_completion_has_its_token_ids_if_they_are_asked_for(server: Server) -> None:
    request: dict[str, Any] = {"prompt": "Count from 3", "temperature": 0, "max_tokens": 12, "return_token_ids": True}
    (choice,) = server.request("POST", "/v1/completions", request).json["choices"]
    stream = server.request("POST", "/v1/completions", request | {"stream": True}).body
    events = [json.loads(line[6:]) for line in stream.split(b"\n") if line.startswith(b"data: {")]
    sent = [number for event in events for choice in event["choices"] for number in choice.get("token_ids", ())]
    assert sent == choice["token_ids"]
    assert server.request("POST", "/detokenize", {"tokens": sent}).json["prompt"].startswith(choice["text"])


def test_with_ignore_eos_an_answer_continues_after_its_end(server: Server) -> None:
    request: dict[str, Any] = {"prompt": "Hello", "temperature": 0, "max_tokens": 60, "return_token_ids": True}
    bodies = {
        ignored: server.request("POST", "/v1/completions", request | {"ignore_eos": ignored}).json
        for ignored in (False, True)
    }
    assert bodies[True]["usage"]["completion_tokens"] == 60
    assert bodies[True]["choices"][0]["finish_reason"] == "length"
    shorter, longer = (bodies[ignored]["choices"][0]["token_ids"] for ignored in (False, True))
    assert longer[: len(shorter)] == shorter


def test_the_models_small_files_are_those_of_its_folder(server: Server) -> None:
    answer = server.request("GET", "/v1/model-files").json
    assert (answer["name"], answer["context_tokens"]) == ("kimi-k2-tiny", 16384)
    for name, text in answer["files"].items():
        assert base64.b64decode(text) == (BUILTIN_FOLDER / name).read_bytes()
    assert {"config.json", "tiktoken.model"} <= answer["files"].keys()


@pytest.mark.parametrize("prompt", [[], "", ["a", "b"], [1, "a"], [10**9], [[1], [2]], 5, None, [True]])
def test_an_invalid_prompt_is_a_400(server: Server, prompt: object) -> None:
    answer = server.request("POST", "/v1/completions", {"prompt": prompt})
    assert (answer.status, answer.error["param"]) == (400, "prompt")


def test_choices_of_a_text_completion_are_those_of_single_requests_with_their_seeds(server: Server) -> None:
    request: dict[str, Any] = {"model": "any", "prompt": "Count from 3", "temperature": 4.0, "max_tokens": 9, "seed": 3}
    several = server.client.completions.create(n=3, best_of=3, extra_body={"min_tokens": 9}, **request)
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert several.usage is not None and several.usage.completion_tokens == 27
    single = server.client.completions.create(extra_body={"min_tokens": 9}, **request)
    assert single.choices[0].text == texts[0]
    streamed = ["", "", ""]
    for chunk in server.client.completions.create(n=3, stream=True, extra_body={"min_tokens": 9}, **request):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


@pytest.mark.parametrize("name", ["suffix", "echo", "logprobs", "best_of", "n"])
def test_unsupported_fields_of_text_completions_are_a_400(server: Server, name: str) -> None:
    value = "a" if name == "suffix" else 5 if name in ("logprobs", "best_of") else 0 if name == "n" else True
    answer = server.request("POST", "/v1/completions", {"prompt": "a", name: value})
    assert (answer.status, answer.error["param"]) == (400, name)


@pytest.mark.parametrize("text", ["Hello wörld ☃", "", "<|im_end|>", "a\n\nb"])
def test_tokens_become_the_text_again(server: Server, text: str) -> None:
    answer = server.request("POST", "/tokenize", {"prompt": text}).json
    assert answer["count"] == len(answer["tokens"])
    assert server.request("POST", "/detokenize", {"tokens": answer["tokens"]}).json == {"prompt": text}


def test_messages_are_tokenized_as_a_chat_request_renders_them(server: Server) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    tokens = server.request("POST", "/tokenize", {"messages": messages}).json
    body = server.request("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 1}).json
    assert tokens["count"] == body["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {}), ("/tokenize", {"prompt": 5}), ("/detokenize", {"tokens": [-1]})]
)
def test_tokens_of_a_bad_body_are_a_400(server: Server, path: str, body: object) -> None:
    assert server.request("POST", path, body).status == 400


def test_the_status_names_stages_and_requests(server: Server) -> None:
    status = server.request("GET", "/v1/status").json
    assert (status["state"], status["slots"], status["context_tokens"]) == ("ready", 4, 16384)
    assert len(status["stages"]) == 2
    assert status["stages"][0]["first_layer"] == 0
    assert status["stages"][0]["last_layer"] + 1 == status["stages"][1]["first_layer"]
    assert status["requests"] == []
    assert (status["faults"], status["restarts"], status["phase"]) == (0, 0, "")
    for stage in status["stages"]:
        assert stage["loaded_bytes"] == stage["shard_bytes"] > 0


def test_the_status_has_the_work_of_the_last_hour(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Count from 3"}], "max_tokens": 5}
    usage = server.request("POST", "/v1/chat/completions", body).json["usage"]
    status = server.request("GET", "/v1/status").json
    (first, last) = status["stages"]
    assert 0 < first["busy_fraction"] <= 1
    assert first["sent_bytes_per_s"] > 0
    assert last["sent_bytes_per_s"] == 0
    assert 0 < last["waiting_fraction"] <= 1
    recent = status["history"][-2:]
    assert sum(point["tokens"] for point in recent) >= usage["completion_tokens"]
    assert sum(point["computed_tokens"] for point in recent) > 0
    assert all(len(point["busy_fractions"]) == 2 and 0 <= point["seconds_ago"] <= 3610 for point in status["history"])


def test_the_metrics_are_those_of_the_golden_list_and_count(server: Server) -> None:
    before = metrics_of(server)
    body = server.request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}).json
    after = metrics_of(server)
    families = {family.name: family for family in text_string_to_metric_families(after)}
    assert {name: family.type for name, family in families.items() if not name.endswith("_created")} == METRICS
    assert (
        value(after, "mlx_k2_prompt_tokens_total") - value(before, "mlx_k2_prompt_tokens_total")
        == (body["usage"]["prompt_tokens"])
    )
    assert (
        value(after, "mlx_k2_generation_tokens_total") - value(before, "mlx_k2_generation_tokens_total")
        == (body["usage"]["completion_tokens"])
    )
    for total, by_source in (("num_draft", "draft"), ("num_accepted", "accepted_draft")):
        counts = [sample.value for sample in families[f"mlx_k2_{by_source}_tokens"].samples if "_total" in sample.name]
        assert sum(counts) == value(after, f"mlx_k2_spec_decode_{total}_tokens_total")
    for family in families.values():
        if family.type == "histogram" and "first_token" in family.name:
            assert max(float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels) >= 1800


def metrics_of(server: Server) -> str:
    answer = server.request("GET", "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.body.decode()


def value(text: str, name: str) -> float:
    match = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert match
    return float(match[1])


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1"])
def test_a_page_of_another_origin_is_refused_and_gets_no_cors_headers(server: Server, origin: str) -> None:
    for method, path in (("POST", "/v1/chat/completions"), ("OPTIONS", "/v1/chat/completions"), ("GET", "/v1/models")):
        answer = server.request(method, path, Origin=origin)
        assert answer.status == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_page_of_the_servers_own_origin_is_allowed(server: Server) -> None:
    assert server.request("GET", "/v1/models", Origin="http://localhost").status == 200
