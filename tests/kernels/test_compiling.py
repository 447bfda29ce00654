"""Every shipped kernel and tile compiles for every target, without new spills, in its memory, on the matrix units."""

import os

import pytest

from scinet_kernels import tiles


@pytest.mark.nightly
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's kernels cannot be compiled")
def test_binaries_are_as_recorded_when_compiled_anew(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    from scinet_kernels.compiling import SHARED_LIMIT, compile_all, read_table

    recorded = {(row.kernel, row.architecture, row.bits): row for row in read_table()}
    found = {(row.kernel, row.architecture, row.bits): row for row in compile_all()}
    assert set(found) == set(recorded), "make kernels/compiled.json anew: python -m scinet_kernels.compiling --write"
    for key, row in found.items():
        assert row.tile == recorded[key].tile, key
        assert row.spills <= recorded[key].spills, key
        assert row.shared_bytes <= SHARED_LIMIT[row.architecture], key
        assert row.matrix_instructions >= recorded[key].matrix_instructions > 0, key


def test_the_table_covers_every_architecture_and_no_shipped_kernel_spills() -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter's kernels cannot be compiled")
    from scinet_kernels.compiling import read_table

    for kernel in ("gaussian_forward", "gaussian_panel", "pearson"):
        for architecture in tiles.ARCHITECTURES:
            for bits in (16, 32):
                assert (kernel, architecture, bits) in tiles.TABLE
    assert all(row.spills == 0 for row in read_table())
