"""How the C++ of decode is compiled and kept; what it computes: test_decode.py, test_decode_kernels.py."""

import os
import platform
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_dmc.ops.decode import LayerCache, cpp
from megatron_dmc.ops.decode.layout import Layout
from tests.support.decoding import draw_stream, through_cache
from tests.support.oracle import Shape

PROGRAM = """
import torch
from megatron_dmc.ops.decode import LayerCache
from tests.support.decoding import draw_stream, through_cache
from tests.support.oracle import Shape
cache = LayerCache(4)
out = through_cache(draw_stream(Shape(1, 20, 4, 2, 16), torch.float32), [15, 1, 1, 3], cache)
print(cache.rows.form, out.double().sum().item())
"""


# What is compiled computes the same, and is there in a quarter of the time.
QUICK = Path(__file__).with_name("quick_compiler.sh")


def run(
    cache: Path, *, folder: Path | None = None, program: str = PROGRAM, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """In a process of its own, in ``folder``; compiled without optimization, unless CXX says by what."""
    settings = {**os.environ, "XDG_CACHE_HOME": str(cache), "CXX": str(QUICK), **environment}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=settings, cwd=folder, capture_output=True, text=True, timeout=300)


def result(done: "subprocess.CompletedProcess[str]") -> tuple[str, float]:
    assert done.returncode == 0, done.stderr
    form, number = done.stdout.split()
    return form, float(number)


def test_it_is_compiled_once_by_processes_at_the_same_time(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: result(run(tmp_path)), range(2))
    assert first == second and first[0] == "cpp"
    (made,) = (tmp_path / "megatron_dmc").iterdir()
    assert made.suffix == ".so" and stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    before = made.stat().st_mtime_ns
    assert result(run(tmp_path, CXX="false")) != first  # another compiler's would be another one's
    assert result(run(tmp_path)) == first and made.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "compiler", ["false", "no-such-compiler", "sh -c 'echo no error here; exit 3' --", "g++ 'oops", r"printf '\377'"]
)
def test_without_a_compiler_decoding_says_so_and_goes_on(tmp_path, compiler):
    expected = result(run(tmp_path / "other"))[1]
    done = run(tmp_path, CXX=compiler)
    form, found = result(done)
    assert form == "torch" and found == pytest.approx(expected, abs=1e-4)
    said = [line for line in done.stderr.splitlines() if "UserWarning" in line]
    assert len(said) == 1 and "decoding runs on torch's own operations, which are slower" in said[0], done.stderr


def test_a_compiler_without_threads_will_do(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-fopenmp*) echo "error: no OpenMP" >&2; exit 1;; esac\nexec {QUICK} "$@"\n'
    )
    compiler.chmod(0o700)
    assert result(run(tmp_path, CXX=str(compiler)))[0] == "cpp"


OTHER_WIDTHS = """
import torch
from megatron_dmc.ops.decode import LayerCache
from tests.support.decoding import draw_stream, through_cache
from tests.support.oracle import Shape
for head_dim in (64, 80, 128):
    stream = draw_stream(Shape(2, 150, 6, 2, head_dim), torch.float32)
    for kind in ((0, "merge"), (16, "evict"), (5, "absorb"), (4, "merge", 7)):
        found, expected = (
            through_cache(stream, [100, 1, 1, 1, 47], LayerCache(*kind, backend=form)) for form in ("cpp", "torch")
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have vectors of one width")
@pytest.mark.parametrize("without", ["avx512f", "avx"])
def test_narrower_vectors_give_the_same(tmp_path, without):
    """Of 32 and of 16 bytes; the machine's own are in all other tests."""
    done = run(tmp_path, program=OTHER_WIDTHS, CXX=f"c++ -mno-{without}")
    assert done.returncode == 0, done.stderr


def test_what_was_cut_off_is_made_again(tmp_path):
    expected = result(run(tmp_path))
    (made,) = (tmp_path / "megatron_dmc").iterdir()
    whole = made.read_bytes()
    for length in (0, 20_000):
        made.write_bytes(whole[:length])
        assert result(run(tmp_path)) == expected and made.stat().st_size == len(whole)


@pytest.mark.parametrize("cache", ["relative", "~/cache"])
def test_a_relative_cache_is_none(tmp_path, cache):
    done = run(Path(cache), PYTHONPATH=str(Path.cwd()), folder=tmp_path)
    assert result(done)[0] == "cpp" and not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["writable-by-others", "a-file", "not-writable"])
def test_a_folder_that_is_not_the_users_alone_is_not_used(tmp_path, kind):
    """What lies there would be run."""
    folder = tmp_path / "megatron_dmc"
    if kind == "a-file":
        folder.write_text("mine")
    else:
        folder.mkdir()
        folder.chmod(0o777 if kind == "writable-by-others" else 0o500)
    if kind == "not-writable" and os.access(folder, os.W_OK):
        pytest.skip("root may write anywhere")
    assert result(run(tmp_path))[0] == "cpp"
    assert folder.read_text() == "mine" if kind == "a-file" else not any(folder.iterdir())


def test_what_it_cannot_do_is_named(monkeypatch):
    key = torch.empty(1, 2, 64)
    for layout in (Layout(), Layout(5, "absorb"), Layout(5, window_size=12)):
        assert cpp.unsupported(layout, key) is None and cpp.unsupported(layout, key.bfloat16()) is None
    assert cpp.unsupported(Layout(), key.half()) == "keys are torch.float16"
    assert cpp.unsupported(Layout(), torch.cat([key] * 5, dim=-1)) == "head_dim is 320"
    assert cpp.unsupported(Layout(0, "evict"), key) == "evict needs a local window"
    cache, tokens = LayerCache(4, backend="cpp"), draw_stream(Shape(1, 5, 2, 1, 8), torch.float64)
    with pytest.raises(ValueError, match=r"cannot run on cpp: keys are torch\.float64; leave backend at auto"):
        through_cache(tokens, [5], cache)
    monkeypatch.setattr(cpp, "library", lambda: None)
    assert cpp.unsupported(Layout(), key) == "no C++ could be compiled"


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads):
    tokens, before = draw_stream(Shape(3, 200, 6, 2, 64), torch.float32), torch.get_num_threads()
    cuts = [150, *[1] * 20, 30]
    expected = through_cache(tokens, cuts, LayerCache(4, backend="torch"))
    try:
        torch.set_num_threads(threads)
        found = through_cache(tokens, cuts, LayerCache(4, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
