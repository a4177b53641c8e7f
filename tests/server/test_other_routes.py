"""Tests of text completions, tokens, status, metrics and origins on a served built-in model."""

import base64
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.server.cluster_activity import INTERVAL_S
from tests.server.http_client import CHAT_PATH
from tests.server.server_process import Server

COMPLETIONS_PATH = "/v1/completions"
METRIC_TYPES = {
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


def test_a_text_completion_has_its_token_ids_on_request(server: Server) -> None:
    request: dict[str, Any] = {"prompt": "Count from 3", "temperature": 0, "max_tokens": 12, "return_token_ids": True}
    (choice,) = server.request("POST", COMPLETIONS_PATH, request).json["choices"]
    chunks = server.request("POST", COMPLETIONS_PATH, request | {"stream": True}).events
    streamed_choices = [choice for chunk in chunks for choice in chunk["choices"]]
    token_ids = [token_id for choice in streamed_choices for token_id in choice.get("token_ids", ())]
    assert token_ids == choice["token_ids"]
    assert server.request("POST", "/detokenize", {"tokens": token_ids}).json["prompt"].startswith(choice["text"])


def test_with_ignore_eos_an_answer_continues_after_its_end(server: Server) -> None:
    request: dict[str, Any] = {"prompt": "Hello", "temperature": 0, "max_tokens": 60, "return_token_ids": True}
    (short,) = server.request("POST", COMPLETIONS_PATH, request).json["choices"]
    (long,) = server.request("POST", COMPLETIONS_PATH, request | {"ignore_eos": True}).json["choices"]
    assert (short["finish_reason"], long["finish_reason"]) == ("stop", "length")
    assert len(long["token_ids"]) == 60
    assert long["token_ids"][: len(short["token_ids"])] == short["token_ids"]


def test_the_models_small_files_equal_the_files_in_its_folder(server: Server) -> None:
    model = server.request("GET", "/v1/model-files").json
    assert (model["name"], model["context_tokens"]) == ("kimi-k2-tiny", 16384)
    for name, content in model["files"].items():
        assert base64.b64decode(content) == (BUILTIN_FOLDER / name).read_bytes()
    assert {"config.json", "tiktoken.model"} <= model["files"].keys()


@pytest.mark.parametrize("prompt", [[], "", ["a", "b"], [1, "a"], [10**9], [[1], [2]], 5, None, [True]])
def test_a_malformed_prompt_is_a_400(server: Server, prompt: object) -> None:
    answer = server.request("POST", COMPLETIONS_PATH, {"prompt": prompt})
    assert (answer.status, answer.error["param"]) == (400, "prompt")


def test_several_choices_of_a_text_completion_are_streamed_as_in_the_body(server: Server) -> None:
    request: dict[str, Any] = {
        "model": "any",
        "prompt": "Count from 3",
        "temperature": 4.0,
        "max_tokens": 9,
        "seed": 3,
        "extra_body": {"min_tokens": 9},
    }
    several = server.client.completions.create(n=3, best_of=3, **request)
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert several.usage is not None
    assert several.usage.completion_tokens == 3 * 9
    assert server.client.completions.create(**request).choices[0].text == texts[0]
    streamed_texts = ["", "", ""]
    for chunk in server.client.completions.create(n=3, stream=True, **request):
        for choice in chunk.choices:
            streamed_texts[choice.index] += choice.text
    assert streamed_texts == texts


@pytest.mark.parametrize(
    ("name", "value"), [("suffix", "a"), ("echo", True), ("logprobs", 5), ("best_of", 5), ("n", 0)]
)
def test_an_unsupported_field_of_text_completions_is_a_400(server: Server, name: str, value: object) -> None:
    answer = server.request("POST", COMPLETIONS_PATH, {"prompt": "a", name: value})
    assert (answer.status, answer.error["param"]) == (400, name)


@pytest.mark.parametrize("text", ["Hello wörld ☃", "", "<|im_end|>", "a\n\nb"])
def test_tokens_of_a_text_are_detokenized_to_the_text(server: Server, text: str) -> None:
    answer = server.request("POST", "/tokenize", {"prompt": text}).json
    assert answer["count"] == len(answer["tokens"])
    assert server.request("POST", "/detokenize", {"tokens": answer["tokens"]}).json == {"prompt": text}


def test_messages_are_tokenized_as_a_chat_request_renders_them(server: Server) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    count = server.request("POST", "/tokenize", {"messages": messages}).json["count"]
    usage = server.request("POST", CHAT_PATH, {"messages": messages, "max_tokens": 1}).json["usage"]
    assert count == usage["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {}), ("/tokenize", {"prompt": 5}), ("/detokenize", {"tokens": [-1]})]
)
def test_a_bad_body_of_tokenize_and_detokenize_is_a_400(server: Server, path: str, body: object) -> None:
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
    usage = server.request("POST", CHAT_PATH, body).json["usage"]
    status = server.request("GET", "/v1/status").json
    first, last = status["stages"]
    assert 0 < first["busy_fraction"] <= 1
    assert first["sent_bytes_per_s"] > 0
    assert last["sent_bytes_per_s"] == 0
    assert 0 < last["waiting_fraction"] <= 1
    recent = status["history"][-2:]  # the request may have run in two intervals
    assert sum(point["tokens"] for point in recent) >= usage["completion_tokens"]
    assert sum(point["computed_tokens"] for point in recent) > 0
    max_seconds_ago = 3600 + INTERVAL_S
    for point in status["history"]:
        assert len(point["busy_fractions"]) == 2
        assert 0 <= point["seconds_ago"] <= max_seconds_ago


def metric_families(server: Server) -> dict[str, Metric]:
    answer = server.request("GET", "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(answer.body.decode())}


def total(families: dict[str, Metric], name: str) -> float:
    """Return the sum of a counter over its labels."""
    return sum(sample.value for sample in families[name].samples if sample.name == f"{name}_total")


def test_the_metrics_and_their_types_are_the_listed_ones(server: Server) -> None:
    # prometheus_client adds a time of creation to each counter and histogram
    types = {name: family.type for name, family in metric_families(server).items() if not name.endswith("_created")}
    assert types == METRIC_TYPES


def test_the_metrics_count_the_tokens_of_a_request(server: Server) -> None:
    families_before = metric_families(server)
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    usage = server.request("POST", CHAT_PATH, body).json["usage"]
    families_after = metric_families(server)
    for metric, field in (
        ("mlx_k2_prompt_tokens", "prompt_tokens"),
        ("mlx_k2_generation_tokens", "completion_tokens"),
    ):
        assert total(families_after, metric) - total(families_before, metric) == usage[field]


def test_vllms_metrics_of_draft_tokens_are_the_sums_over_all_drafters(server: Server) -> None:
    families = metric_families(server)
    assert total(families, "mlx_k2_spec_decode_num_draft_tokens") == total(families, "mlx_k2_draft_tokens")
    num_accepted = total(families, "mlx_k2_spec_decode_num_accepted_tokens")
    assert num_accepted == total(families, "mlx_k2_accepted_draft_tokens")


def test_the_time_to_the_first_token_is_measured_up_to_half_an_hour(server: Server) -> None:
    samples = metric_families(server)["mlx_k2_time_to_first_token_seconds"].samples
    assert max(float(sample.labels["le"]) for sample in samples if sample.labels.get("le", "+Inf") != "+Inf") >= 1800


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1"])
def test_a_page_of_another_origin_is_refused_and_gets_no_cors_headers(server: Server, origin: str) -> None:
    for method, path in (("POST", CHAT_PATH), ("OPTIONS", CHAT_PATH), ("GET", "/v1/models")):
        answer = server.request(method, path, Origin=origin)
        assert answer.status == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_page_of_the_server_itself_may_use_it(server: Server) -> None:
    assert server.request("GET", "/v1/models", Origin="http://localhost").status == 200
