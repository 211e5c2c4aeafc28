"""``vllm serve EXPORT`` and nothing else that is about DMC, asked by OpenAI's client."""

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.exports import VOCABULARY
from tests.support.processes import environment, meeting_place
from tests.support.served import NEW_TOKENS, Served, served, served_model

LONGEST = 320
# Of 16 tokens each, for all layers and heads; ten requests of ordinary tokens would fill them.
BLOCKS = 120
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}w1{% endif %}"


class Server(NamedTuple):
    """client: OpenAI's. case: what is served. url: of the server. log: its output."""

    client: Any
    case: Served
    url: str
    log: Path

    def complete(self, prompt: Any, **options: Any) -> Any:
        own = {
            "ignore_eos": True,
            "return_token_ids": True,
            "skip_special_tokens": False,
            **options.pop("extra_body", {}),
        }
        options = {"max_tokens": NEW_TOKENS, "temperature": 0, **options}
        return self.client.completions.create(model="served", prompt=prompt, extra_body=own, **options)

    def metrics(self) -> dict[str, float]:
        """By name, without labels."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=10).read().decode()
        return {name: float(value) for name, value in re.findall(r"^(vllm:\w+)\{.*?\} (\S+)$", text, re.MULTILINE)}

    def is_idle_within(self, seconds: float) -> bool:
        """Whether no request runs or waits and all blocks are free."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.metrics()
            if not any(
                found[f"vllm:{name}"] for name in ("num_requests_running", "kv_cache_usage_perc", "dmc_slots_used")
            ):
                return True
            time.sleep(0.2)
        return False


def write_tokenizer(folder: Path) -> None:
    """A word for each token, so that texts and token ids are one to one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", chat_template=CHAT)
    tokenizer.save_pretrained(folder)


def text(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


@contextmanager
def listening(case: Served, log: Path) -> Iterator[str]:
    """The address of a server; it does not outlive the block."""
    port = meeting_place()["MASTER_PORT"]
    options = {"--port": port, "--dtype": "float32", "--max-model-len": LONGEST, "--served-model-name": "served"}
    options |= {"--num-gpu-blocks-override": BLOCKS, "--max-num-batched-tokens": 128}
    command = ["serve", case.folder, *(x for pair in options.items() for x in pair)]
    # This process' environment is for engines in it.
    variables = environment(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    with log.open("w") as output:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("vllm"), *map(str, command), "--enforce-eager"],
            env=variables,
            stdout=output,
            stderr=output,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(240):
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=2)
                    break
                except OSError:
                    time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from openai import OpenAI

    folder, log = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("log") / "server.log"
    case = served(served_model({"local_window": 4}), folder, (20, 201, 7, 90))
    write_tokenizer(folder)
    with listening(case, log) as url:
        yield Server(OpenAI(base_url=f"{url}/v1", api_key="none"), case, url, log)


def test_completions(server: Server) -> None:
    for prompt, expected in zip(server.case.prompts, server.case.outputs, strict=True):
        answer = server.complete(prompt)
        assert answer.choices[0].token_ids == expected
        assert answer.choices[0].text.split() == text(expected).split()
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), NEW_TOKENS)
    answer = server.complete(server.case.prompts)
    assert [choice.token_ids for choice in answer.choices] == server.case.outputs


def test_chat_and_its_stream(server: Server) -> None:
    prompt, expected = server.case.prompts[0], server.case.outputs[0]
    model = served_model({"local_window": 4})
    asked = [*prompt, 1]
    out = model.generate(torch.tensor([asked]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(asked) :].tolist()
    assert out != expected
    request = {
        "model": "served",
        "messages": [{"role": "user", "content": text(prompt)}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "skip_special_tokens": False},
    }
    assert server.client.chat.completions.create(**request).choices[0].message.content.split() == text(out).split()
    parts = server.client.chat.completions.create(**request, stream=True)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert streamed.split() == text(out).split()


def test_streamed_tokens(server: Server) -> None:
    got: list[int] = []
    for part in server.complete(server.case.prompts[1], stream=True):
        got += part.choices[0].token_ids or []
    assert got == server.case.outputs[1]


def test_logprobs_are_the_exports(server: Server) -> None:
    prompt, expected = server.case.prompts[3], server.case.outputs[3]
    answer = server.complete(prompt, logprobs=3)
    model = served_model({"local_window": 4})
    with torch.no_grad():
        logits = model(torch.tensor([prompt + expected]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    best = logits.float().log_softmax(-1).topk(3)
    found = answer.choices[0].logprobs
    assert found.token_logprobs == pytest.approx(best.values[:, 0].tolist(), abs=2e-3)
    for top, values in zip(found.top_logprobs, best.values.tolist(), strict=True):
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(values, abs=2e-3)


def test_several_answers_to_one_prompt(server: Server) -> None:
    # vLLM gives one answer only at temperature 0.
    answer = server.complete(server.case.prompts[1], n=3, temperature=1.0, extra_body={"top_k": 1})
    assert [choice.token_ids for choice in answer.choices] == [server.case.outputs[1]] * 3
    # Without a seed: vLLM 0.32 itself cannot have one on a CPU.
    answer = server.complete(server.case.prompts[1], n=3, temperature=2.0)
    assert len({choice.text for choice in answer.choices}) == 3


def test_a_stop_string_ends_an_answer(server: Server) -> None:
    expected = server.case.outputs[0]
    place = next(i for i in range(8, NEW_TOKENS) if expected[i] not in expected[:i])
    answer = server.complete(server.case.prompts[0], stop=[f"w{expected[place]} "])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text.split() == text(expected[:place]).split()
    assert server.is_idle_within(10)


def test_a_request_chooses_how_hard_it_is_compressed(server: Server) -> None:
    prompt = server.case.prompts[1]
    model = served_model({"local_window": 4})
    made = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        merge_threshold=60.0,
        return_dict_in_generate=True,
    )
    cache = next(made[name] for name in ("cache", "past_key_values") if name in made)
    answer = server.complete(prompt, extra_body={"vllm_xargs": {"merge_threshold": 60.0}})
    assert answer.choices[0].token_ids == made.sequences[0, len(prompt) :].tolist() != server.case.outputs[1]
    assert answer.kv_transfer_params["merge_threshold"] == 60.0
    assert answer.kv_transfer_params["compression_ratio"] == pytest.approx(cache.compression_ratio, rel=0.02)
    assert server.complete(prompt).choices[0].token_ids == server.case.outputs[1]


def test_forty_requests_at_once(server: Server) -> None:
    """More than fit; uncompressed, nine of the long ones would."""
    numbers = [i % len(server.case.prompts) for i in range(40)]
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda i: server.complete(server.case.prompts[i]).choices[0].token_ids, numbers))
    assert answers == [server.case.outputs[i] for i in numbers]
    assert server.is_idle_within(10)


def test_clients_that_go_away(server: Server) -> None:
    """While prompts are read and while answers are written."""
    streams = [server.complete(server.case.prompts[1], max_tokens=100, stream=True) for _ in range(6)]
    for _, _ in zip(streams[0], range(5), strict=False):
        pass
    running = server.metrics()
    assert running["vllm:num_requests_running"] > 1 and running["vllm:dmc_slots_used"] > 0
    for stream in streams:
        stream.close()
    assert server.is_idle_within(20)
    assert server.complete(server.case.prompts[0]).choices[0].token_ids == server.case.outputs[0]


def test_metrics_speak_of_slots(server: Server) -> None:
    streams = [server.complete(server.case.prompts[1], max_tokens=100, stream=True) for _ in range(4)]
    for stream in streams:
        next(iter(stream))
    found = server.metrics()
    for stream in streams:
        stream.close()
    per_token = 3 * 2  # layers and heads
    assert 4 * 201 * per_token / 6 < found["vllm:dmc_slots_used"] < 4 * 301 * per_token / 2
    assert 2 < found["vllm:dmc_compression_ratio"] < 6
    # A block is a cell for every layer and head, and one block is vLLM's own.
    used = BLOCKS - 1 - found["vllm:dmc_cells_free"] / per_token
    assert used == pytest.approx(found["vllm:kv_cache_usage_perc"] * (BLOCKS - 1), abs=0.01)
    assert found["vllm:dmc_slots_used"] < used * 16 * per_token
    uncompressed = (BLOCKS - 1) / (LONGEST / 16 + 2)
    assert 1.5 * uncompressed < found["vllm:dmc_most_requests"] < 6 * uncompressed
    assert server.is_idle_within(20)
    assert server.metrics()["vllm:dmc_cells_free"] == (BLOCKS - 1) * per_token


def test_the_log_says_how_much_fits(server: Server) -> None:
    line = (
        f"{BLOCKS - 1} blocks of 16 slots per KV head: 5.41 requests of {LONGEST} tokens at once without merging, about"
    )
    assert len([x for x in server.log.read_text().splitlines() if line in x]) == 1
    assert "prefix caching is switched off" in server.log.read_text()


def test_a_prompt_that_is_too_long_is_refused(server: Server) -> None:
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match=str(LONGEST)):
        server.complete([5] * (LONGEST + 1))
    assert server.complete(server.case.prompts[2]).choices[0].token_ids == server.case.outputs[2]
