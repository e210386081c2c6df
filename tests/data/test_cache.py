"""The feature cache: what is encoded when, that nothing is lost or mixed up, and that a row is what it is made from."""

import concurrent.futures
import dataclasses
import pathlib
import pickle
import re
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest

from acejax import UserError, lcu
from acejax.data import latents, pictures, prepare, progress
from acejax.data.augment import AugmentConfig
from acejax.data.cache import encode, store, tiles
from acejax.data.cache.features import positions
from acejax.data.cache.survey import Recipe
from acejax.data.cache.team import Team
from acejax.data.layout import CanvasConfig
from tests.counts import count
from tests.data.cached import AUGMENT, CANVAS, Counting, build, files, png, rng, samples, shards_of, two


@pytest.fixture(autouse=True)
def several_shards(monkeypatch):
    from acejax.data.cache import chunks
    for name in ("SHARD", "PROMPTS"):
        monkeypatch.setattr(chunks, name, getattr(chunks, name))
    shards_of(20_000)


def encoded(folder, source, **changes):
    """Tiles and prompts that a build had to encode."""
    report, _ = build(folder, source, **changes)
    return report.tiles_encoded, report.prompts_encoded


def test_a_second_run_encodes_nothing(tmp_path, capsys):
    first, counting = build(tmp_path, samples())[0], Counting()
    before = files(tmp_path)
    again, _ = build(tmp_path, samples(), counting)
    assert first.tiles_encoded == first.tiles > 0 and first.prompts_encoded == first.prompts == 6
    assert (again.tiles_encoded, again.prompts_encoded, again.nbytes) == (0, 0, 0)
    assert counting.batches == 0 and not counting.prompts
    assert files(tmp_path) == before and len([name for name in before if name.startswith("shards")]) > 3
    assert "all there, nothing encoded" in capsys.readouterr().out


def test_a_second_run_decodes_nothing(tmp_path, monkeypatch):
    build(tmp_path, samples())
    monkeypatch.setattr(pictures, "decode", None)
    monkeypatch.setattr(pictures, "decode_mask", None)
    build(tmp_path, samples())


def test_what_is_the_same_is_encoded_once(tmp_path):
    """Six samples: targets 6, images 3 (one is the target), references 2 different, grey of 4 sizes."""
    source = samples()
    report, features = build(tmp_path, source)
    # kept and changed: of the two with a mask, of which one has a reference, so that all inside is hidden
    local, subject = 2 + 1, 1 + 1
    changed = {"text": 0, "edit": 1, "free": 1}
    greys = {(64, 48), (64, 64)} | {(64, width) for width in features._parts[0].index["widths"].tolist()}
    references = 3  # the shared one is drawn at two heights
    assert report.tiles == 6 + local + subject + sum(changed.values()) + len(greys) + references
    assert encoded(tmp_path, source + source) == (0, 0)
    # another target for the same everything is one tile, and a new draw of its reference
    other = dataclasses.replace(source[1], target=png(5000, 64, 64))
    assert encoded(tmp_path, [*source, other]) == (1, 0)


def test_a_changed_autoencoder_encodes_tiles_again_and_no_prompt(tmp_path):
    first, _ = build(tmp_path, samples())
    masks = 2
    assert encoded(tmp_path, samples(), name="counting in bfloat16") == (first.tiles - masks, 0)
    assert encoded(tmp_path, samples()) == (0, 0)


def test_a_changed_size_limit_encodes_what_changes_size(tmp_path):
    """Canvases of 64 x 48 have 12 tokens and stay as they are; those of 64 x 64 have 16."""
    kept, changed = samples()[::2], samples()[1::2]
    build(tmp_path, samples())
    smaller = CanvasConfig(max_tokens=12)
    assert encoded(tmp_path, kept, canvas=smaller) == (0, 0)
    needed = build(tmp_path / "alone", changed, canvas=smaller)[0].tiles
    assert encoded(tmp_path, samples(), canvas=smaller) == (needed, 0)
    assert encoded(tmp_path, samples(), canvas=dataclasses.replace(CANVAS, editing_height=0.5)) == (0, 0)


def test_a_changed_cleaning_encodes_prompts_whose_ids_change(tmp_path):
    build(tmp_path, samples())
    assert encoded(tmp_path, samples(), clean=lambda prompt: " ".join(prompt.split())) == (0, 0)
    counting = Counting()
    report, _ = build(tmp_path, samples(), counting, clean=lambda prompt: prompt.replace("3", "three"))
    assert report.prompts_encoded == 1 and counting.prompts[0] == "prompt 3" and not counting.batches
    captions = [dataclasses.replace(sample, prompt=f"{sample.prompt}, nicer") for sample in samples()]
    assert encoded(tmp_path, captions) == (0, 6), "what was drawn for the pictures does not depend on the prompts"


def test_masks_of_parity_without_references(tmp_path):
    source, canvas = [samples()[2]], CanvasConfig(max_tokens=16, parity="reference")
    _, features = build(tmp_path, source, canvas=canvas)
    plan = Recipe(canvas, AUGMENT, 1, 0, "", str.encode, "").visit(source[0], tiles.hashes(source[0]), 0)
    made = prepare.compose(source[0], canvas, plan)
    np.testing.assert_array_equal(features.fetch(0, rng())["mask"], lcu.patchify(lcu.fold_mask(
        made.mask[None, ..., None]))[0])


@pytest.mark.parametrize("changes", [{}, {"scale": 0.0}, {"scale": 1.0, "budget": "canvas"}, {"parity": "reference"}],
                         ids=["default", "scale 0", "scale 1", "parity"])
@pytest.mark.parametrize("make", [CanvasConfig, CanvasConfig.lora], ids=["split", "unsplit"])
def test_a_row_is_its_canvas_encoded(tmp_path, make, changes):
    """Exactly, in float32, for every variant: joined tiles are what the whole canvas gives."""
    canvas = make(max_tokens=16, **changes)
    augment, source, counting = AugmentConfig(full_mask=0.2, random_mask=0.4), samples(12), Counting()
    _, features = build(tmp_path, source, canvas=canvas, augment=augment, variants=3)
    recipe = Recipe(canvas, augment, 3, 0, "", str.encode, "")
    masks = set()
    for index, sample in enumerate(source):
        tokens = []
        for variant in range(3):
            plan = recipe.visit(sample, tiles.hashes(sample), variant)
            masks.add(plan.mask)
            made = prepare.compose(sample, canvas, plan)
            expected = latents.encode([made], counting.pictures)
            row = features._parts[0].fetch(index, variant, False)
            assert set(row) == {*expected, "positions", "unit", "text", "pooled"}
            for field in ("edit", "modify", "target"):
                if field in expected:
                    np.testing.assert_array_equal(row[field], lcu.patchify(expected[field])[0], field)
            mask = lcu.patchify(lcu.fold_mask(made.mask[None, ..., None]))[0]
            np.testing.assert_array_equal(row["mask"], mask)
            units = np.repeat([*range(len(made.widths) - 1), -1], [width // 16 for width in made.widths])
            assert row["unit"].dtype == np.int8 and (row["unit"].reshape(-1, len(units)) == units).all()
            np.testing.assert_array_equal(row["positions"], positions(made.mask.shape[0] // 16, len(units)))
            text, pooled = counting.texts([sample.prompt])
            np.testing.assert_array_equal(row["text"], text[0])
            np.testing.assert_array_equal(row["pooled"], pooled[0])
            tokens.append(len(mask))
        assert features.tokens[index] == max(tokens) and features.references[index] == len(sample.references)
        assert features.tasks[features.task[index]] == sample.task
    assert masks == {"own", "full", "random"}


def test_fetch_draws_variants_and_leaves_prompts_out(tmp_path):
    source = [samples()[4]]
    report, features = build(tmp_path, source, augment=AugmentConfig(drop_caption=0.3), variants=4)
    assert report.prompts == 2, "the empty one, too"
    counting = Counting()
    told, left = (counting.texts([prompt])[0][0] for prompt in (source[0].prompt, ""))
    draw = np.random.default_rng(1)
    rows = [features.fetch(0, draw) for _ in range(200)]
    empty = [np.array_equal(row["text"], left) for row in rows]
    assert all(np.array_equal(row["text"], told) for row, dropped in zip(rows, empty, strict=True) if not dropped)
    assert 35 < sum(empty) < 85
    assert len({row["edit"].tobytes() for row in rows}) == 4
    first, again = (features.fetch(0, rng()) for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_bfloat16_stays_bfloat16(tmp_path):
    _, exact = build(tmp_path, samples())
    report, features = build(tmp_path, samples(), dtype="bfloat16")
    assert report.tiles_encoded == report.tiles - 2 and report.prompts_encoded == 6, "all but the masks"
    for index in range(6):
        row, full = features.fetch(index, rng()), exact.fetch(index, rng())
        for name in ("edit", "modify", "target", "text", "pooled"):
            assert row[name].dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(row[name], full[name].astype(ml_dtypes.bfloat16))


def test_killed_runs_end_as_an_uninterrupted_one(tmp_path):
    """Every file, byte by byte; killed at random moments, in the middle of writing as well."""
    kills = count(3, 20)
    command = [sys.executable, "-W", "ignore", "-m", "tests.data.cached", tmp_path / "killed", str(kills), "7"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) >= 0.8 * kills, "it was killed while it ran"
    build(tmp_path / "whole", samples(24))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_broken_pictures_are_skipped_counted_and_told(tmp_path, capsys):
    """A broken one takes with it the samples that need it, and no other that shares a tile with them."""
    source = samples(24)
    cut = png(77, 64, 48)
    reference = png(78, 40, 48)
    source[4] = dataclasses.replace(source[4], mask=cut[:len(cut) // 2])  # its image alone is fine ...
    source[10] = dataclasses.replace(source[10], image=source[4].image)  # ... and serves here
    for index in (16, 22):
        source[index] = dataclasses.replace(source[index], references=(reference[:len(reference) // 2],))
    source[0] = dataclasses.replace(source[0], target=b"no picture")
    report, features = build(tmp_path, source, max_broken=0.2)
    assert len(features) == 20 and [name for name, _ in report.skipped] == [
        "sample 0", "sample 4", "sample 16", "sample 22"]
    reasons = [reason for _, reason in report.skipped]
    assert "target of list.jsonl:1" in reasons[0] and "mask of list.jsonl:5" in reasons[1]
    assert "reference 1 of list.jsonl:17" in reasons[2] and "damaged" in reasons[2]
    assert "4 samples skipped" in capsys.readouterr().out
    _, about = store.read(report.index)
    assert [name for name, _ in about["skipped"]] == [name for name, _ in report.skipped]
    for index in range(20):
        features.fetch(index, rng())
    assert features._parts[0].index["row"].tolist() == [i for i in range(24) if i not in (0, 4, 16, 22)]
    again, _ = build(tmp_path, source, counting := Counting(), max_broken=0.2)
    assert not counting.batches and again.skipped == report.skipped
    build(tmp_path / "clean", [source[i] for i in range(24) if i not in (0, 4, 16, 22)])


def test_too_many_broken_pictures_stop_the_run(tmp_path):
    source = samples(24)
    cut = png(77, 64, 64)[:300]
    for index in (3, 9):
        source[index] = dataclasses.replace(source[index], target=cut, image=cut)
    with pytest.raises(UserError, match=r"list: 2 of 24 samples are broken, more than the share of 0.05.*list.jsonl:4"):
        build(tmp_path, source, max_broken=0.05)
    assert not (tmp_path / "index").exists()
    source[3] = dataclasses.replace(source[3], target=b"", image=None)
    source[9] = dataclasses.replace(source[9], target=b"", image=None)
    with pytest.raises(UserError, match=r"2 of 24 samples .*picture target of list.jsonl:10: found an empty file"):
        build(tmp_path, source, max_broken=0.05)


class Picks(list):
    """Samples that are read in part; what is not needed is no picture."""

    def pick(self, index, unit):
        sample = self[index]
        own = {field: getattr(sample, field) if unit == -1 else b"-" for field in ("target", "image", "mask")}
        return dataclasses.replace(sample, **own, references=tuple(
            data if unit == number else b"-" for number, data in enumerate(sample.references)))


def test_jobs_read_what_they_need(tmp_path, monkeypatch):
    """And no header again, nor is anything hashed."""
    source, augment = samples(12), AugmentConfig(full_mask=0.2, random_mask=0.4)
    build(tmp_path / "whole", source, augment=augment, variants=3)
    tiled = encode.encode_tiles

    def late(*given):
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "hashes", None)
            patch.setattr(pictures, "size", None)
            return tiled(*given)

    monkeypatch.setattr(encode, "encode_tiles", late)
    build(tmp_path / "parts", Picks(source), augment=augment, variants=3)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_the_largest_reference_number_is_named(tmp_path):
    good, bad = png(78, 40, 48), png(79, 40, 48)[:200]
    source = [dataclasses.replace(samples()[5], references=(good, bad))]
    report, _ = build(tmp_path, source * 2, max_broken=1)
    assert len(report.skipped) == 2 and "reference 2 of list.jsonl:6" in report.skipped[0][1]


def test_processes_share_the_work_and_end_alike(tmp_path):
    """Two threads stand for two processes: each writes its own shards, all files are those of one process alone."""
    source = samples(24)
    source[7] = dataclasses.replace(source[7], target=png(9, 64, 64)[:200])
    barrier = threading.Barrier(2, timeout=60)
    counting = [Counting(), Counting()]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda i: build(tmp_path / "two", source, counting[i], max_broken=0.1,
                                                team=Team(i, 2, lambda name: barrier.wait()))[0], range(2)))
    alone, _ = build(tmp_path / "one", source, both := Counting(), max_broken=0.1)
    assert reports[0].nbytes + reports[1].nbytes == alone.nbytes and min(report.nbytes for report in reports) > 0
    assert sorted(counting[0].prompts + counting[1].prompts) == sorted(both.prompts)
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_slow_process_leaves_no_work_to_nobody(tmp_path, monkeypatch):
    shards_of(3000)
    table, first = store.Store.table, []

    def late(self, *names):
        first.append(threading.current_thread())
        if first[0] != first[-1]:
            time.sleep(0.1)
        return table(self, *names)

    monkeypatch.setattr(store.Store, "table", late)
    _, features = two(tmp_path / "two", samples(12))[0]
    monkeypatch.undo()
    _, alone = build(tmp_path / "one", samples(12))
    for index in range(12):
        row, expected = features.fetch(index, rng()), alone.fetch(index, rng())
        assert all(np.array_equal(row[name], expected[name]) for name in expected)


def test_features_that_are_not_finite_are_refused(tmp_path):
    counting = Counting()
    texts = counting.texts

    def huge(prompts):
        text, pooled = texts(prompts)
        return text * np.where(np.array(prompts) == "prompt 3", 1e6, 1)[:, None, None], pooled

    counting.texts = huge
    with pytest.raises(UserError, match="the prompt 'prompt 3': the text encoders gave numbers that are not finite, "
                                        "stored in float16; expected"):
        build(tmp_path, samples(), counting, dtype="float16")
    counting = Counting()
    pictures = counting.pictures
    counting.pictures = lambda tiles: pictures(tiles) * np.nan
    with pytest.raises(UserError, match="edit of sample 0: the autoencoder gave numbers that are not finite, stored"):
        build(tmp_path / "tiles", samples()[:2], counting)
    assert not list(tmp_path.rglob("index"))


def test_features_pickle_small_and_are_read_by_many_threads(tmp_path):
    _, features = build(tmp_path, samples(24))
    features.fetch(0, rng())
    pickled = pickle.dumps(features)
    assert len(pickled) < 1000, "paths alone: another process opens its own files"
    copy = pickle.loads(pickled)
    expected = [features.fetch(index, rng())["target"] for index in range(24)]
    order = [*range(24)] * 8
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for index, row in zip(order, pool.map(lambda i: copy.fetch(i, rng()), order), strict=True):
            assert np.array_equal(row["target"], expected[index])


def test_counts_are_told_before_the_work(tmp_path, capsys):
    build(tmp_path, samples())
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "list: 6 samples, 13 distinct pictures, 6 tasks"
    assert said[1].split() == ["tiles", "19", "needed", "0", "there", "19", "to", "encode"]
    assert said[2].split() == ["prompts", "6", "needed", "0", "there", "6", "to", "encode"]


def test_the_time_is_told_when_it_is_known(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "MEASURED", 0.02)
    build(tmp_path, samples(24), Counting(slow=0.03))
    said = capsys.readouterr().out.splitlines()
    told = [line for line in said if "about" in line]
    assert len(told) == 2 and re.fullmatch(r"list: pictures: about 1 minute for \d+ more tiles", told[0])
    assert told[1].startswith("list: prompts: about 1 minute for ") and said.index(told[0]) == 4


def test_positions_are_those_of_the_lcu():
    np.testing.assert_array_equal(positions(3, 5), lcu.positions(6, 10))
