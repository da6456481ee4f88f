"""Chains survive being saved, wherever their pictures are."""

from pathlib import Path

import pytest
from PIL import Image

from examples.capimagine.chains import Chain, Picture, load, open_picture, save


def _chain(folder: Path) -> Chain:
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4), (10, 20, 30)).save(folder / "images" / "a.png")
    return Chain(
        id="7",
        subset="Visual_CoT",
        folder=folder,
        prompt=(Picture("images/a.png"), "what?"),
        reply=(
            "<think_image> a red \n\u2028 cube </think_image> so <think_image>x</think_image> cube",
        ),
        answer="cube",
        system="be kind",
    )


@pytest.mark.parametrize("where", ["raw/chains.jsonl", "out/chains.jsonl", "chains.jsonl"])
def test_saved_and_loaded_is_the_same_chain_with_the_same_picture(
    tmp_path: Path, where: str
) -> None:
    chain = _chain(tmp_path / "raw")
    assert save([chain], tmp_path / where) == 1
    (read,) = load(tmp_path / where)
    assert (read.id, read.reply, read.answer, read.system) == (
        chain.id,
        chain.reply,
        chain.answer,
        chain.system,
    )
    (path,) = read.pictures(read.prompt)
    assert open_picture(path).getpixel((0, 0)) == (10, 20, 30)
    assert read.imagined == ("a red \n\u2028 cube", "x")
    assert [m["role"] for m in read.messages()] == ["system", "user", "assistant"]
    assert read.example()["text"] == "what?"


def test_a_line_that_is_no_chain_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chains.jsonl"
    save([_chain(tmp_path / "raw")], path)
    path.write_text(path.read_text() + '{"id": "8"}\n')
    with pytest.raises(ValueError, match=r"line 2 of chains\.jsonl is no chain"):
        load(path)


def test_nothing_is_left_half_written(tmp_path: Path) -> None:
    def broken():
        yield _chain(tmp_path / "raw")
        raise RuntimeError("no more")

    path = tmp_path / "chains.jsonl"
    path.write_text("as it was\n")
    with pytest.raises(RuntimeError, match="no more"):
        save(broken(), path)
    assert path.read_text() == "as it was\n"
