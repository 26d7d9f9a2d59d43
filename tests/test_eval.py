"""Recalls against a full sort, protocols, and evaluation that gives one clear line when it cannot run."""
import json
import os
import pickle

import numpy as np
import pytest
import torch

import data
import eval_grm
from conftest import ROOT, TINY
from eval_grm import recall_at_k


def sorted_ranks(similarity, image_of_text):
    """Ranks by sorting, a tie putting the wrong candidate first: the definition, in numpy."""
    s, owner = np.asarray(similarity, np.float64), np.asarray(image_of_text)
    i2t = []
    for i in range(len(s)):
        order = sorted(range(s.shape[1]), key=lambda t: (-s[i, t], owner[t] == i))
        if (owner == i).any():
            i2t.append(1 + next(place for place, t in enumerate(order) if owner[t] == i))
    t2i = [1 + sorted(range(len(s)), key=lambda i: (-s[i, t], owner[t] == i)).index(owner[t]) for t in range(s.shape[1])]
    return np.array(i2t), np.array(t2i)


@pytest.mark.parametrize("ties", [False, True])
def test_recalls_and_median_ranks_equal_a_full_sort(ties):
    rng = np.random.default_rng(0)
    owner = np.sort(rng.integers(0, 30, 90))                                # any number of captions per image, also none
    s = rng.normal(size=(30, 90)) + 1.5 * (owner[None] == np.arange(30)[:, None])
    s = np.round(s) if ties else s
    figures = recall_at_k(torch.tensor(s), torch.tensor(owner))
    i2t, t2i = sorted_ranks(s, owner)
    for way, ranks in (("i2t", i2t), ("t2i", t2i)):
        for k in (1, 5, 10):
            assert figures[f"{way}_r{k}"] == pytest.approx(100 * (ranks <= k).mean())
        assert figures[f"{way}_medr"] == np.median(ranks)
    assert figures["rsum"] == pytest.approx(sum(figures[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)))


def test_a_constant_similarity_finds_nothing():
    figures = recall_at_k(torch.zeros(20, 40), torch.arange(20).repeat_interleave(2))
    assert figures["rsum"] == 0 and figures["t2i_medr"] == 20


def test_other_captions_of_the_image_do_not_count_against_it():
    s = torch.tensor([[.5, .9, .1], [.0, .0, .4]])
    assert recall_at_k(s, torch.tensor([0, 0, 1]))["i2t_r1"] == 100


def test_more_images_than_one_chunk_of_rows():
    owner = torch.arange(600)
    assert recall_at_k(torch.eye(600), owner)["rsum"] == 600
    assert recall_at_k(torch.eye(600).roll(1, 0), owner)["t2i_r1"] == 0


def test_a_nan_and_misfitting_shapes_are_errors():
    s = torch.eye(4)
    s[2, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        recall_at_k(s, torch.arange(4))
    with pytest.raises(ValueError, match="captions"):
        recall_at_k(torch.eye(4), torch.arange(3))
    with pytest.raises(ValueError, match="outside"):
        recall_at_k(torch.eye(4), torch.tensor([0, 1, 2, 4]))


def test_folds_are_the_mean_over_consecutive_groups(tiny_model, tiny_config):
    split = data.load_split("shapes", tiny_config["datasets"], "")
    tokenizer = data.load_tokenizer(None, split.texts[:20])
    whole, folded = eval_grm.evaluate(tiny_model, split, tokenizer, tiny_config, torch.device("cpu"), 8, (1, 4), False)
    parts = [eval_grm.evaluate(tiny_model, split.subset(slice(a, a + 8)), tokenizer, tiny_config, torch.device("cpu"), 8,
                               (1,), False)[0] for a in range(0, 32, 8)]
    for level in ("ori", "key", "unc", "combined"):
        assert folded[level]["rsum"] == pytest.approx(np.mean([part[level]["rsum"] for part in parts]))
    assert folded["combined"]["t2i_r10"] > whole["combined"]["t2i_r10"]                  # fewer distractors, easier


def test_batch_size_changes_no_figure(tiny_model, tiny_config):
    split = data.load_split("shapes", tiny_config["datasets"], "")
    tokenizer = data.load_tokenizer(None, split.texts)
    results = [eval_grm.evaluate(tiny_model, split, tokenizer, tiny_config, torch.device("cpu"), n, (1,), False)[0]
               for n in (3, 32)]
    assert results[0] == results[1]


@pytest.fixture
def shapes(tiny_config):
    split = data.load_split("shapes", tiny_config["datasets"], "")
    return split, data.load_tokenizer(None, split.texts)


def test_captions_in_16_bits_change_no_rank_but_near_ties(tiny_model, tiny_config, shapes):
    split, tokenizer = shapes
    halved = eval_grm.encode_captions(tiny_model.eval(), split, tokenizer, tiny_config, torch.device("cpu"), 64, False)
    ids = data.tokenize(tokenizer, split.texts, 64)
    with torch.no_grad():
        whole = [(i, tiny_model.encode_text(x, valid)) for i, x, valid in data.text_batches(ids, 64, 0)]
    half, full = (eval_grm.similarity_matrices(tiny_model, split, range(32), texts, tiny_config, torch.device("cpu"), 16, False)
                  for texts in (halved, whole))
    assert halved[0][1].tokens.element_size() == 2
    for level in full:
        a, b, tie = half[level].numpy(), full[level].numpy(), 5e-5
        assert np.abs(a - b).max() < tie / 2
        for ours, exact, near in zip(sorted_ranks(a, split.image_of_text), sorted_ranks(b, split.image_of_text),
                                     near_ties(b, split.image_of_text, tie)):
            assert (np.abs(ours - exact) <= near).all()


def near_ties(similarity, owner, tolerance):
    """For every rank, how many candidates score within the tolerance of the right one."""
    own = np.where(owner[None] == np.arange(len(similarity))[:, None], similarity, -np.inf)
    return [(np.abs(similarity - own.max(axis, keepdims=True)) <= tolerance).sum(axis) for axis in (1, 0)]


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tiny_model, tiny_config, shapes, tmp_path, monkeypatch):
    split, tokenizer = shapes
    loaded, real = [], split.load_image
    monkeypatch.setattr(split, "load_image", lambda i, size=None: loaded.append(i) or real(i, size))

    def evaluate(fingerprint, batch_size):
        loaded.clear()
        partial = eval_grm.PartialResult(tmp_path / "partial", fingerprint)
        return eval_grm.evaluate(tiny_model, split, tokenizer, tiny_config, torch.device("cpu"), batch_size, (1,), False,
                                 partial), partial

    whole, partial = evaluate("a" * 64, 8)
    partial.file.close()
    size = partial.path.stat().st_size
    with open(partial.path, "r+b") as file:                      # killed while it wrote the rows of image 20
        file.truncate(64 + (size - 64) * 20 // 32 + 100)
    again, partial = evaluate("a" * 64, 5)
    assert again == whole and loaded == list(range(20, 32)) and partial.path.stat().st_size == size
    partial.file.close()
    other, partial = evaluate("b" * 64, 5)                       # of another checkpoint: from the start
    assert other == whole and loaded == list(range(32))
    partial.remove()
    assert not partial.path.exists()


def share(rank, where, arguments):
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"               # its threads did not survive the fork
    torch.distributed.init_process_group("gloo", init_method=f"file://{where}/meeting", rank=rank, world_size=2)
    split = arguments[1]
    loaded, real = [], split.load_image
    split.load_image = lambda i, size=None: loaded.append(i) or real(i, size)
    results = eval_grm.evaluate(*arguments)
    (where / f"{rank}.json").write_text(json.dumps([results, loaded]))
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_work_and_return_the_same_figures(tiny_model, tiny_config, shapes, tmp_path):
    split, tokenizer = shapes
    arguments = tiny_model, split.subset(slice(13)), tokenizer, tiny_config, torch.device("cpu"), 4, (1, 2), False
    torch.multiprocessing.start_processes(share, (tmp_path, arguments), nprocs=2, start_method="fork")
    (first, images), (second, others) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second == eval_grm.evaluate(*arguments)
    assert images == list(range(6)) and others == list(range(6, 13))


# -------------------------------------------------------------------------------------------------------------- the script

@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A trained tiny run, by the real script."""
    import sys
    import train_grm
    out, argv = tmp_path_factory.mktemp("runs") / "tiny", sys.argv
    sys.argv = ["train_grm.py", "--config", str(ROOT / "configs.yaml"), "--backbone", "vit_micro", "--out", str(out),
                "--set", *TINY, "train.max_steps=2"]
    try:
        train_grm.main()
    finally:
        sys.argv = argv
    return out


def test_evaluation_prints_every_level_and_writes_metrics(script, run_folder, tmp_path):
    failure, printed = script("eval", "--ckpt", run_folder / "best.pt", "--split", "shapes", "--out", tmp_path / "report")
    assert failure is None and all(level in printed for level in ("ori", "key", "unc", "combined", "rSum"))
    report = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"metrics.json"}
    assert report["images"] == 32 and report["captions"] == 160 and set(report["levels"]) == {"ori", "key", "unc", "combined"}
    assert {"i2t_r1", "t2i_r10", "rsum", "i2t_medr"} <= report["levels"]["combined"].keys()


def test_limit_takes_the_first_images_and_their_captions(script, run_folder, tmp_path):
    script("eval", "--ckpt", run_folder / "best.pt", "--split", "shapes", "--limit", 10, "--out", tmp_path)
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["images"] == 10 and report["captions"] == 50


def test_a_bare_name_means_the_newest_run(script, run_folder, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "vit_micro-shapes").symlink_to(run_folder)
    monkeypatch.chdir(tmp_path)
    failure, printed = script("eval", "--ckpt", "best.pt", "--split", "shapes_val")
    assert failure is None and "runs/vit_micro-shapes/best.pt" in printed


class Bomb:
    def __reduce__(self):
        import os
        return os.mkdir, (str(Bomb.path),)


@pytest.mark.parametrize("content", ["text", "pickle", "other", "cut"])
def test_what_is_not_a_checkpoint_is_one_line_and_never_runs(content, script, run_folder, tmp_path):
    path, Bomb.path = tmp_path / "x.pt", tmp_path / "ran"
    if content == "text":
        path.write_text("not a checkpoint")
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif content == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes((run_folder / "best.pt").read_bytes()[:5000])
    failure, _ = script("eval", "--ckpt", path, "--split", "shapes")
    assert failure.startswith("error: ") and str(path) in failure and "\n" not in failure
    assert not Bomb.path.exists()


def test_a_checkpoint_of_another_version_is_one_line(run_folder, tmp_path, script):
    checkpoint = torch.load(run_folder / "best.pt", weights_only=True)
    checkpoint["config"]["model"]["unheard_of"] = 1
    torch.save(checkpoint, tmp_path / "best.pt")
    failure, _ = script("eval", "--ckpt", tmp_path / "best.pt", "--split", "shapes")
    assert "another version" in failure and "unheard_of" in failure and "\n" not in failure


@pytest.mark.parametrize("argv, said", [
    (["--ckpt", "nowhere.pt"], "no such checkpoint"),
    (["--split", "coco7k"], "coco5k"),                                                   # lists what there is
    (["--split", "coco5k", "--data-root", "nowhere"], "dataset_coco.json"),
    (["--split", "f8k_val"], "dataset_flickr8k.json")])
def test_evaluation_says_in_one_line_what_is_missing(argv, said, script, run_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    failure, _ = script("eval", *(["--ckpt", run_folder / "best.pt"] if "--ckpt" not in argv else []), *argv)
    assert failure.startswith("error: ") and said in failure and "\n" not in failure
