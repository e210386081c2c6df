"""Prompts become the ids that ACE++ was trained on; FLUX's real tokenizers are read."""

import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from acejax.data.text import ADDED_TOKENS, Tokenizers, clean
from acejax.errors import UserError
from tests import tokenizers

PROMPTS = ["a photo of a cat", "Restore {image}, then add a red ½ “hat”.", "", "  Café\n\tÀ 日本  "]


@pytest.fixture(scope="module")
def folder():
    return tokenizers.folder()


@pytest.fixture(scope="module")
def trained(folder):
    return Tokenizers.open(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return Tokenizers.open(folder, reference=True)


@pytest.mark.parametrize(("text", "expected"), [
    ("  a \n\t b\u00a0 c\u3000", "a b c"),
    ("AT&amp;amp;T &lt;img&gt; &amp;quot;x&amp;quot;", 'AT&T <img> "x"'),
    ("&amp;amp;lt; <", "&lt; <"),  # ftfy leaves HTML alone beside a "<": twice and no more
    ("â€œcafÃ©â€\x9d", '"café"'),
    ("Ｆｕｌｌ ﬁne", "Full fine"),
    ("keep {image} {ref_image} Case", "keep {image} {ref_image} Case"),
    ("", ""),
])
def test_clean(text, expected):
    assert clean(text) == expected
    assert clean(expected) == expected or "&" in expected


def ids_of(found, end):
    """The ids of one prompt up to its end token."""
    (ids,), _ = found
    return ids[:list(ids).index(end) + 1].tolist()


def test_added_tokens_have_the_trained_ids(trained):
    (ids,), _ = trained.t5_ids([" ".join(ADDED_TOKENS)])
    assert ids[:15].tolist() == [*range(32_100, 32_114), 1]
    assert ADDED_TOKENS[1] == "{image}" and len(ADDED_TOKENS) == 14


@pytest.mark.parametrize("mode, image", [("trained", 32_101), ("reference", 32_100)])
def test_image_stands_alone(request, mode, image):
    """No piece of a space remains before it; after it a word is as at the start of a text."""
    read = request.getfixturevalue(mode)
    assert ids_of(read.t5_ids(["from the doodle {image} that"]), 1) == [
        45, 8, 3, 26, 14_957, image, 24, 1]  # from, the, _, d, oodle, that
    assert ids_of(read.t5_ids(["the{image}that"]), 1) == [8, image, 24, 1]
    assert ids_of(read.t5_ids(["{image}"]), 1) == [image, 1]


def test_reference_mode_adds_image_alone_and_does_not_clean(trained, reference):
    assert ids_of(trained.t5_ids(["{mask}"]), 1) == [32_103, 1]
    assert ids_of(reference.t5_ids(["{mask}"]), 1) == [3, 2, 2754, 157, 2, 1]  # _, unknown, mas, k, unknown
    assert 32_101 in trained.t5_ids(["｛image｝"])[0] and 32_100 not in reference.t5_ids(["｛image｝"])[0]  # full width
    for read in ("t5_ids", "clip_ids"):
        for mode, same in ((trained, True), (reference, False)):
            escaped, plain = getattr(mode, read)(["a &amp; b", "a & b"])[0]
            assert (escaped == plain).all() == same


def test_known_prompts(trained):
    """Ids of FLUX's vocabularies; CLIP has no added token and no case."""
    assert ids_of(trained.t5_ids(["Hello world cat"]), 1) == [8774, 296, 1712, 1]
    assert ids_of(trained.clip_ids(["Hello WORLD cat"]), 49_407) == [49_406, 3306, 1002, 2368, 49_407]
    assert ids_of(trained.clip_ids(["a {image} b"]), 49_407) == [49_406, 320, 346, 2867, 348, 321, 49_407]


@pytest.mark.parametrize("read, length, pad", [("t5", 512, 0), ("clip", 77, 49_407)])
def test_pads_and_cuts_as_transformers(reference, read, length, pad):
    prompts = [*PROMPTS, "word " * (length - 10), "some longer words " * length]
    ids, cut = getattr(reference, f"{read}_ids")(prompts)
    judge = getattr(reference, read)
    expected = judge(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="np").input_ids
    assert ids.shape == (len(prompts), length) and ids.dtype == np.int32
    np.testing.assert_array_equal(ids, expected)
    assert ids[0, -1] == pad
    assert cut[:-1].tolist() == [0] * (len(prompts) - 1)
    assert cut[-1] == len(judge(prompts[-1], verbose=False).input_ids) - length > 0


def test_t5_reads_as_its_own_file_says(folder, reference):
    """transformers builds T5's tokenizer anew: it must split as `tokenizer.json` does, read without it."""
    judge = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer_2" / "tokenizer.json"))
    for prompt in (*PROMPTS[:1], *PROMPTS[2:], "ﬁne Ａ ½ ① x² e\u0301 ™ … — \u00a0nb", "a  b ", "<extra_id_0> x"):
        assert ids_of(reference.t5_ids([prompt]), 1) == judge.encode(prompt).ids


def test_no_prompts_no_ids(trained):
    assert [part.shape for part in trained.t5_ids([])] == [(0, 512), (0,)]


def test_folders_given_apart(folder, trained):
    apart = Tokenizers.open(t5=folder / "tokenizer_2", clip=folder / "tokenizer")
    for read in ("t5_ids", "clip_ids"):
        np.testing.assert_array_equal(getattr(apart, read)(PROMPTS)[0], getattr(trained, read)(PROMPTS)[0])


def test_needs_no_pytorch_no_network_and_says_nothing(folder, tmp_path):
    """With PyTorch hidden and the network gone; a folder that names code of its own has it ignored."""
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, tmp_path / name)
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        settings["auto_map"] = {"AutoTokenizer": ["code.Mine", "code.Mine"]}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
        (tmp_path / name / "code.py").write_text("raise SystemExit('code of the folder ran')")
    run = subprocess.run([sys.executable, "-c", textwrap.dedent("""
        import socket, sys
        sys.modules["torch"] = None
        def refuse(*args):
            raise SystemExit("went online")
        socket.socket.connect = socket.getaddrinfo = refuse
        from acejax.data.text import Tokenizers
        read = Tokenizers.open(sys.argv[1])
        print(read.t5_ids(["a {image}" + " word" * 600])[1][0], read.clip_ids(["word " * 100])[1][0])
    """), str(tmp_path)], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "92 25\n", "")


def test_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(UserError, match="expected both, or FLUX's folder"):
        Tokenizers.open(t5=tmp_path)
    with pytest.raises(UserError, match=r"tokenizer_2/tokenizer\.json: no such file; expected .* with tokenizer\.json"):
        Tokenizers.open(tmp_path)


def test_damaged_or_other_tokenizer_is_named(folder, tmp_path):
    t5 = shutil.copytree(folder / "tokenizer_2", tmp_path / "t5")
    clip = shutil.copytree(folder / "tokenizer", tmp_path / "clip")
    shutil.copy(t5 / "tokenizer.json", clip)  # transformers prefers it to the other two
    with pytest.raises(UserError, match="clip: not FLUX's CLIP tokenizer: the id of 'start' is .*; expected 49406"):
        Tokenizers.open(t5=t5, clip=clip)
    (clip / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"clip/merges\.txt: no such file; expected .* vocab\.json and merges\.txt"):
        Tokenizers.open(t5=t5, clip=clip)
    (t5 / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="t5: cannot be read as a T5Tokenizer"):
        Tokenizers.open(folder, t5=t5)
    pieces = json.loads((folder / "tokenizer_2" / "tokenizer.json").read_text())
    del pieces["model"]["vocab"][500:510]
    (t5 / "tokenizer.json").write_text(json.dumps(pieces))
    with pytest.raises(UserError, match="not FLUX's T5 tokenizer: the id of '<img>' is 32090; expected 32100"):
        Tokenizers.open(folder, t5=t5)
