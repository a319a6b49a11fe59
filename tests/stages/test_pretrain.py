"""pretrain and adapt --from: an encoder complete on disk, and what starts from it."""

import json
import re
import shutil

import checkerboard as board
import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_bert import write_tiny_bert

from tfrec.artifact import Artifact, file_digest
from tfrec.data.dataset import Dataset
from tfrec.data.sequences import EventCoding
from tfrec.errors import ArtifactError, ConfigError, InputError
from tfrec.models import named
from tfrec.models.encoder import EncoderCard, PretrainedEncoder
from tfrec.models.engine import load_recommender
from tfrec.models.keras_bridge import tf_keras
from tfrec.models.weights import KNOWN, Known
from tfrec.recommender import Request
from tfrec.stages import adapt, encode, merge, prepare, pretrain

pytestmark = pytest.mark.slow

TINY = (
    "pretrain.jit_compile=false",
    "pretrain.epochs=3",
    "pretrain.batch_size=8",
    "pretrain.warmup_steps=1",
    "pretrain.checkpoint_minutes=0",
    "pretrain.ema=0.5",
    "adapt.refit=false",
)
OBJECTIVES = "{masked = 1.0, vae = 0.2, text_history = 0.5}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files and a BERT; changed by no test."""
    made = tmp_path_factory.mktemp("pretrain")
    write_tiny_bert(made / "bert")
    return board.write(made / "files").parent


def config(folder, *settings, objectives=OBJECTIVES):
    given = (f"adapt.text={folder / 'bert'}", f"pretrain.objectives={objectives}", *TINY)
    return board.config(folder / "files", *given, *settings)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run that was pretrained; changed by no test."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    prepare.run(config(folder), out)
    pretrain.run(config(folder), out)
    return out


def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def vectors_in(path):
    column = pq.read_table(path)["vector"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


class TestArtifact:
    def test_it_holds_weights_and_a_card(self, finished):
        artifact = Artifact.load(finished / "pretrain", "encoder")
        assert set(artifact.files) == {"card.json", "history.json", "weights.safetensors"}
        card = json.loads(artifact.file("card.json").read_text())
        assert card["objectives"]["masked"] == 1.0
        assert set(card["losses"]) == {"loss", "masked", "vae", "text_history"}
        assert card["data"]["users"] == board.USERS
        assert card["text"]["trained"] is False
        assert not (finished / ".pretrain.work").exists()

    def test_the_curve_of_every_objective_is_kept(self, finished):
        history = json.loads((finished / "pretrain" / "history.json").read_text())["sequences"]
        assert [record["epoch"] for record in history] == [1, 2, 3]
        assert all(np.isfinite(record["masked"]) for record in history)

    def test_the_same_recipe_is_not_trained_again(self, folder, finished, monkeypatch):
        monkeypatch.setattr(pretrain, "Trainer", None)
        before = Artifact.load(finished / "pretrain")
        assert pretrain.run(config(folder), finished).created == before.created

    def test_the_same_seed_gives_the_same_encoder(self, folder, finished, tmp_path):
        (tmp_path / "prepare").symlink_to(finished / "prepare")
        again = pretrain.run(config(folder), tmp_path)
        assert again.metrics["losses"] == Artifact.load(finished / "pretrain").metrics["losses"]
        assert (
            again.files["weights.safetensors"]
            == (Artifact.load(finished / "pretrain").files["weights.safetensors"])
        )

    def test_only_training_events_are_seen(self, folder, finished, tmp_path):
        """Other validation and test events, the same encoder."""
        dataset = Dataset.load(finished / "prepare")
        events = dataset.interactions
        item = events.item.copy()
        held_out = events.split > 0
        item[held_out] = np.roll(item[held_out], 5)
        from dataclasses import replace

        Dataset(replace(events, item=item), dataset.catalog, dataset.users).save(
            tmp_path / "prepare"
        )
        other = pretrain.run(config(folder), tmp_path)
        here = Artifact.load(finished / "pretrain")
        assert other.files["weights.safetensors"] == here.files["weights.safetensors"]


class TestAdapting:
    @pytest.mark.parametrize("more", [(), ("adapt.tuning.behaviour_layers=[-1]",)])
    def test_it_starts_from_the_encoder(self, folder, finished, tmp_path, more):
        """A step so small that nothing moves leaves what was pretrained."""
        out = copy(finished, tmp_path)
        still = ("adapt.encoder=pretrain", "adapt.retrieval.epochs=1", "adapt.learning_rate=1e-30")
        adapt.run(config(folder, *still, *more), out, "retrieval")
        encoder = PretrainedEncoder.load(out / "pretrain")
        model = load_recommender(out, "select").engine.two_tower
        for name, variable in named.named_variables(model).items():
            np.testing.assert_allclose(variable.numpy(), encoder.weights[name], rtol=1e-5)
        parents = Artifact.load(out / "adapt" / "retrieval").parents
        assert parents["encoder"] == Artifact.load(out / "pretrain").digest

    def test_what_is_complete_in_itself_needs_the_encoder_no_more(self, folder, finished, tmp_path):
        out = copy(finished, tmp_path)
        adapt.run(config(folder, "adapt.encoder=pretrain"), out, "retrieval")
        before = load_recommender(out, "select").engine.encode_text(["space ship"])
        shutil.rmtree(out / "pretrain")
        after = load_recommender(out, "select").engine.encode_text(["space ship"])
        np.testing.assert_array_equal(before, after)

    def test_its_folder_is_found_from_another_one(self, folder, finished, tmp_path, monkeypatch):
        (tmp_path / "saved" / "one").mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir()
        shutil.copytree(finished / "pretrain", tmp_path / "saved" / "two" / "pretrain")
        out = copy(finished, tmp_path / "saved" / "one")
        monkeypatch.chdir(tmp_path)
        some = ("adapt.encoder=saved/two/pretrain", "adapt.tuning.behaviour=head")
        adapt.run(config(folder, *some), out, "retrieval")
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert load_recommender(out, "select").recommend([Request(history=("i2",))])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"made_by": "tomorrow"}, "has an unknown 'made_by': another version"),
            ({"data": None}, "has no 'data'"),
            ({"text": {"name": "bert"}}, r"has no 'text\.digest'"),
            ({"coding": {"event_names": [], "zones": 3}}, r"has no 'coding\.rating_max'"),
            ({"sizes": {}}, r"has no 'sizes\.embedding_dim'"),
        ],
    )
    def test_a_card_of_another_version_is_refused(self, finished, change, message):
        card = json.loads((finished / "pretrain" / "card.json").read_text()) | change
        with pytest.raises(ArtifactError, match=message):
            EncoderCard.parse({name: part for name, part in card.items() if part is not None})

    def test_made_again_it_is_another_base(self, folder, finished, tmp_path):
        out = copy(finished, tmp_path)
        some = ("adapt.encoder=pretrain", "adapt.tuning.behaviour=head")
        adapt.run(config(folder, *some), out, "retrieval")
        pretrain.run(config(folder, "seed=2"), out)
        with pytest.raises(ArtifactError, match=r"from an encoder of digest \w{12}, and .* has \w"):
            load_recommender(out, "select")

    def test_where_nothing_moves_it_is_said_and_measured_as_it_came(
        self, folder, finished, tmp_path, capsys
    ):
        out = copy(finished, tmp_path)
        frozen = ("adapt.encoder=pretrain", "adapt.tuning.behaviour=head", "adapt.refit=false")
        adapt.run(config(folder, *frozen), out, "retrieval")
        told = capsys.readouterr().err
        assert "adapt.tuning.behaviour = head moves none" in told
        encoder = PretrainedEncoder.load(out / "pretrain")
        model = load_recommender(out, "select").engine.two_tower
        for name, variable in named.named_variables(model).items():
            np.testing.assert_array_equal(variable.numpy(), encoder.weights[name])

    def test_somebody_new_may_bring_a_profile(self, folder, finished, tmp_path):
        out = copy(finished, tmp_path)
        adapt.run(config(folder, "adapt.encoder=pretrain"), out, "retrieval")
        profile = np.load(out / "adapt" / "retrieval" / "profile.npy")
        assert profile.shape[1] > 0
        assert not profile.any()

    def test_it_goes_to_another_catalog_by_its_texts(self, folder, finished, tmp_path):
        """Other ids, other users: blocks and text are taken over, ids are not."""
        files = board.write(tmp_path / "files", items=16, users=12)
        for name in ("events.csv", "items.csv"):
            header, *lines = (files / name).read_text().splitlines()
            lines = [re.sub(r"\b[i](\d+)\b", r"x\1", line) for line in lines]
            (files / name).write_text("\n".join([header, *lines]) + "\n")
        given = (f"data.interactions={files / 'events.csv'}", f"data.items={files / 'items.csv'}")
        here = config(folder, *given, f"adapt.encoder={finished / 'pretrain'}")
        out = tmp_path / "run"
        prepare.run(here, out)
        from tfrec.models.inputs import text_encoder
        from tfrec.models.retrieval import TwoTower

        dataset = Dataset.load(out / "prepare")
        encoder = PretrainedEncoder.load(finished / "pretrain")
        text = np.zeros((len(dataset.catalog), encoder.card.text["width"]), np.float32)
        model = TwoTower(here.adapt.retrieval, text, dataset.catalog.features)
        before = {n: v.numpy() for n, v in named.named_variables(model).items()}
        encoder.check(here.adapt, text_encoder(here.adapt, dataset), dataset)
        taken = encoder.start(model, dataset)
        after = {n: v.numpy() for n, v in named.named_variables(model).items()}
        assert "candidate_tower.ids" not in taken
        np.testing.assert_array_equal(after["candidate_tower.ids"], before["candidate_tower.ids"])
        for name in ("candidate_tower.text.kernel", "query_tower.encoder.blocks.0.qkv.kernel"):
            np.testing.assert_array_equal(after[name], encoder.weights[name])
        names = dataset.catalog.schema.names
        row, there = names.index("shade=black"), encoder.card.features.index("shade=black")
        kernel = "candidate_tower.attributes.kernel"
        np.testing.assert_array_equal(after[kernel][row], encoder.weights[kernel][there])
        adapt.run(here, out, "retrieval")

    def test_users_of_another_cut_are_other_vectors(self, folder, finished, tmp_path):
        """One cut's weights serve all, and histories end elsewhere."""
        out, path = copy(finished, tmp_path), tmp_path / "users.parquet"
        adapt.run(config(folder, "adapt.encoder=pretrain"), out, "retrieval")
        encode.run(out, "users", cut="select", out=path)
        with pytest.raises(InputError, match="cut"):
            encode.run(out, "users", cut="final", out=path)

    def test_types_of_events_may_be_left_out_of_both(self, folder, tmp_path):
        """The table of types is then shorter than the names of types."""
        quiet = config(
            folder,
            "adapt.retrieval.events=false",
            "pretrain.epochs=1",
            "adapt.encoder=pretrain",
            objectives="{next_item = 1.0}",
        )
        out = tmp_path / "run"
        prepare.run(quiet, out)
        assert EventCoding.of(Dataset.load(out / "prepare").interactions).event_names
        pretrain.run(quiet, out)
        made = adapt.run(quiet, out, "retrieval")
        assert (
            "query_tower.tables.event"
            in json.loads(made.file("model.json").read_text())["pretrained"]
        )

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            (
                "adapt.retrieval.layers=2",
                r"pretrained with layers = 1, and adapt\.retrieval\.layers",
            ),
            ("adapt.retrieval.embedding_dim=16", r"embedding_dim = 8"),
            ("adapt.text_length=8", r"with adapt\.text_length = 16, and here it is 8"),
            ("adapt.text=none", r"reads items by their text, and here adapt\.text is 'none'"),
        ],
    )
    def test_another_architecture_is_refused(self, folder, finished, tmp_path, setting, message):
        out = copy(finished, tmp_path)
        with pytest.raises((ConfigError, InputError), match=message):
            adapt.run(config(folder, "adapt.encoder=pretrain", setting), out, "retrieval")
        assert not (out / "adapt" / "retrieval").exists()

    def test_another_text_model_is_refused(self, folder, finished, tmp_path):
        out = copy(finished, tmp_path)
        write_tiny_bert(tmp_path / "other", seed=5)
        other = config(folder, "adapt.encoder=pretrain", f"adapt.text={tmp_path / 'other'}")
        with pytest.raises(ConfigError, match=r"other weights; set adapt\.text="):
            adapt.run(other, out, "retrieval")

    def test_another_tokenizer_is_refused(self, folder, finished, tmp_path):
        out = copy(finished, tmp_path)
        write_tiny_bert(tmp_path / "other")
        (tmp_path / "other" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
        other = config(folder, "adapt.encoder=pretrain", f"adapt.text={tmp_path / 'other'}")
        with pytest.raises(ConfigError, match=r"with another tokenizer than that of"):
            adapt.run(other, out, "retrieval")

    def test_no_encoder_there(self, folder, finished, tmp_path):
        out = copy(finished, tmp_path)
        shutil.rmtree(out / "pretrain")
        with pytest.raises(ArtifactError, match="there is no artifact at"):
            adapt.run(config(folder, "adapt.encoder=pretrain"), out, "retrieval")


def reading(folder, *more):
    """Settings that pretrain the BERT too, by every text objective."""
    return config(
        folder,
        "pretrain.train_text=true",
        "pretrain.text_epochs=4",
        "pretrain.text_batch_size=8",
        "pretrain.text_learning_rate=0.003",
        "pretrain.epochs=1",
        *more,
        objectives="{mlm = 1.0, contrastive = 0.5, text_history = 0.5}",
    )


class Counted(tf_keras.callbacks.Callback):
    """Notes the epochs of a training."""

    def __init__(self, epochs, name):
        super().__init__()
        self.epochs, self.name_of = epochs, name

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs.append(self.name_of)


@pytest.fixture(scope="module")
def reader(folder, finished, tmp_path_factory):
    """A run whose BERT was pretrained too."""
    out = tmp_path_factory.mktemp("reader")
    (out / "prepare").symlink_to(finished / "prepare")
    pretrain.run(reading(folder), out)
    return out


class TestTheText:
    def test_it_learns(self, reader):
        curve = json.loads((reader / "pretrain" / "history.json").read_text())["texts"]
        for name in ("mlm", "contrastive", "text_history"):
            assert curve[-1][name] < curve[0][name]

    def test_the_artifact_holds_the_bert_and_adaptation_reads_with_it(self, folder, reader):
        from tfrec.models.text import TextEncoder

        own = TextEncoder.load(reader / "pretrain" / "text", length=16)
        card = PretrainedEncoder.load(reader / "pretrain").card
        assert card.text["trained"] is True
        assert card.text["digest"] == own.digest()
        given = TextEncoder.load(folder / "bert", length=16)
        adapt.run(reading(folder, "adapt.encoder=pretrain"), reader, "retrieval")
        recommender = load_recommender(reader, "select")
        text = ["the war of space ship"]
        np.testing.assert_allclose(
            recommender.engine.encode_text(text), own.encode(text, role="passage"), atol=1e-6
        )
        assert np.abs(own.encode(text) - given.encode(text)).max() > 1e-3

    @pytest.mark.parametrize("method", ["lora", "adapter", "prompt", "bitfit"])
    def test_few_weights_on_it_are_kept_as_a_difference_and_merge(
        self, folder, reader, tmp_path, method
    ):
        """BERT and behaviour encoder both pretrained; loaded with them, and merged without."""
        out = copy(reader, tmp_path)
        few = (f"adapt.tuning.text={method}", f"adapt.tuning.behaviour={method}")
        made = adapt.run(reading(folder, "adapt.encoder=pretrain", *few), out, "retrieval")
        assert made.metrics["text_weights_trained"] < 0.5 * made.metrics["text_weights_total"]
        before = load_recommender(out, "select")
        rows = np.arange(5, dtype=np.int32)
        catalog = before.catalog.features[rows]
        merge.run(out, tmp_path / "merged")
        shutil.rmtree(out / "pretrain")
        with pytest.raises(ArtifactError, match="pretrain"):
            load_recommender(out, "select")
        shutil.rmtree(out / "adapt" / "retrieval")
        shutil.move(tmp_path / "merged", out / "adapt" / "retrieval")
        after = load_recommender(out, "select")
        words, near = ["the war of space ship"], 1e-6 if method == "lora" else 0
        for gives in (
            lambda one: one.engine.encode_text(words),
            lambda one: one.engine.encode_candidate(one.text[rows], catalog, rows),
            lambda one: one.queries(one.who(one.interactions, rows)),
        ):
            np.testing.assert_allclose(gives(after), gives(before), rtol=0, atol=near)

    def test_a_bert_known_by_its_digest_may_be_pretrained_further(
        self, folder, finished, tmp_path, monkeypatch
    ):
        (tmp_path / "prepare").symlink_to(finished / "prepare")
        monkeypatch.setenv("TFREC_CACHE", str(tmp_path / "cache"))
        digest = file_digest(folder / "bert" / "model.safetensors")
        monkeypatch.setitem(KNOWN, "tiny", Known("a test's", {"model.safetensors": digest}, ()))
        shutil.copytree(folder / "bert", tmp_path / "cache" / "weights" / "tiny")
        named = ("adapt.text=tiny", "pretrain.text_epochs=1", "adapt.encoder=pretrain")
        asked = config(folder, *named, objectives="{mlm = 1.0}")
        made = pretrain.run(asked, tmp_path)
        assert file_digest(made.path / "text" / "model.safetensors") != digest
        adapt.run(asked, tmp_path, "retrieval")
        words = ["the war of space ship"]
        np.testing.assert_allclose(
            load_recommender(tmp_path, "select").engine.encode_text(words),
            PretrainedEncoder.load(made.path).text_encoder().encode(words, role="passage"),
            atol=1e-6,
        )

    def test_words_alone(self, folder, finished, tmp_path):
        (tmp_path / "prepare").symlink_to(finished / "prepare")
        alone = config(folder, "pretrain.text_epochs=1", objectives="{mlm = 1.0}")
        made = pretrain.run(alone, tmp_path)
        assert set(made.metrics["losses"]) == {"text_mlm"}
        assert made.metrics["train_seconds"] > 0

    @pytest.mark.parametrize(("name", "epoch"), [("pretrain-text", 2), ("pretrain", 0)])
    def test_a_kill_costs_nothing(self, folder, reader, tmp_path, monkeypatch, name, epoch):
        """In the third epoch of the BERT, or in the first of the towers after it."""
        (tmp_path / "prepare").symlink_to(reader / "prepare")
        plain = pretrain.callbacks

        class Killed(tf_keras.callbacks.Callback):
            def on_epoch_begin(self, number, logs=None):
                self.now = number

            def on_train_batch_end(self, batch, logs=None):
                if (self.now, batch) == (epoch, 1):
                    raise InterruptedError

        with monkeypatch.context() as patch:
            patch.setattr(
                pretrain,
                "callbacks",
                lambda trackers, out, of, tree: [
                    *plain(trackers, out, of, tree),
                    *([Killed()] if of == name else []),
                ],
            )
            with pytest.raises(InterruptedError):
                pretrain.run(reading(folder), tmp_path)
        assert not (tmp_path / "pretrain").exists()
        steps = []
        with monkeypatch.context() as patch:
            patch.setattr(
                pretrain, "callbacks", lambda trackers, out, of, tree: [Counted(steps, of)]
            )
            made = pretrain.run(reading(folder), tmp_path)
        undisturbed = Artifact.peek(reader / "pretrain").files
        for name_of, entry in made.files.items():
            if name_of.endswith(".safetensors"):
                assert entry == undisturbed[name_of], name_of
        assert steps.count("pretrain-text") == (4 - epoch if name == "pretrain-text" else 0)

    def test_layers_that_are_computed_twice_learn_the_same(self, folder, reader, tmp_path):
        (tmp_path / "prepare").symlink_to(reader / "prepare")
        twice = pretrain.run(reading(folder, "pretrain.recompute=true"), tmp_path)
        curves = [
            [record["mlm"] for record in json.loads(told.file("history.json").read_text())["texts"]]
            for told in (twice, Artifact.peek(reader / "pretrain"))
        ]
        np.testing.assert_allclose(*curves, rtol=1e-3)

    def test_in_half_precision_and_in_pieces(self, folder, finished, tmp_path):
        (tmp_path / "prepare").symlink_to(finished / "prepare")
        half = ("pretrain.precision=mixed_bfloat16", "pretrain.accumulate=2")
        made = pretrain.run(reading(folder, *half), tmp_path)
        told = json.loads(made.file("history.json").read_text())["texts"]
        assert told[-1]["mlm"] < told[0]["mlm"]


class TestEncode:
    """`tfrec encode DIR/pretrain`."""

    def test_vectors_are_those_that_adaptation_starts_with(self, folder, finished, tmp_path):
        out = copy(finished, tmp_path)
        still = ("adapt.encoder=pretrain", "adapt.retrieval.learning_rate=1e-9")
        adapt.run(config(folder, *still, "adapt.retrieval.epochs=1"), out, "retrieval")
        started = load_recommender(out, "select")
        items = vectors_in(encode.run(out / "pretrain", "items", cut="select"))
        assert items.shape == (board.ITEMS, 8)
        np.testing.assert_allclose(items, started.vectors[1:], atol=1e-5)
        users = vectors_in(encode.run(out / "pretrain", "users", cut="select"))
        asked = started.who(started.interactions, np.arange(board.USERS, dtype=np.int32))
        np.testing.assert_allclose(users, started.queries(asked), atol=1e-5)

    def test_the_file_names_the_encoder(self, finished, tmp_path):
        out = copy(finished, tmp_path)
        path = encode.run(out / "pretrain", "items")
        assert path == out / "encode" / "items-towers-pretrained.parquet"
        told = pq.read_schema(path).metadata
        assert told[b"tfrec.model"].decode() == Artifact.peek(out / "pretrain").digest

    def test_texts_need_no_run_around_it(self, reader, tmp_path):
        shutil.copytree(reader / "pretrain", tmp_path / "published")
        (tmp_path / "texts.txt").write_text("the war of space ship\n")
        path = encode.run(
            tmp_path / "published",
            "texts",
            texts=tmp_path / "texts.txt",
            out=tmp_path / "t.parquet",
        )
        own = PretrainedEncoder.load(reader / "pretrain").text_encoder()
        wanted = own.encode(["the war of space ship"], role="passage")
        np.testing.assert_allclose(vectors_in(path), wanted, atol=1e-6)

    def test_items_need_one(self, finished, tmp_path):
        shutil.copytree(finished / "pretrain", tmp_path / "published")
        with pytest.raises(ArtifactError, match="prepare"):
            encode.run(tmp_path / "published", "items")


class TestUsers:
    def test_some_users_adapt_and_the_others_pretrain(self, folder, finished, tmp_path):
        out = copy(finished, tmp_path)
        half = ("adapt.users=0.5", "pretrain.users=others", "adapt.encoder=pretrain")
        made = pretrain.run(config(folder, *half), out)
        card = json.loads(made.file("card.json").read_text())
        assert card["data"]["users"] == board.USERS // 2
        adapt.run(config(folder, *half), out, "retrieval")

    def test_all_of_them_leave_no_others(self, folder, finished, tmp_path):
        with pytest.raises(ConfigError, match=r"adapt\.users is 1; set it below 1"):
            pretrain.run(config(folder, "pretrain.users=others"), copy(finished, tmp_path))


class TestWhatItSaw:
    def test_of_another_split_it_is_refused_in_its_own_folder(self, folder, finished, tmp_path):
        out = copy(finished, tmp_path)
        other = config(folder, "adapt.encoder=pretrain", "data.split=user_cold")
        prepare.run(other, out)
        with pytest.raises(ArtifactError, match=r"held out; run `tfrec pretrain` again"):
            adapt.run(other, out, "retrieval")

    def test_of_another_folder_it_is_taken_and_that_is_said(
        self, folder, finished, tmp_path, capsys
    ):
        other = config(folder, f"adapt.encoder={finished / 'pretrain'}", "data.split=user_cold")
        prepare.run(other, tmp_path / "run")
        adapt.run(other, tmp_path / "run", "retrieval")
        assert "but not on this split of their events" in capsys.readouterr().err

    @pytest.mark.parametrize("setting", ["temperature=0.5", "text_dropout=0.1"])
    def test_what_changes_it_is_part_of_its_recipe(self, folder, finished, tmp_path, setting):
        out = copy(finished, tmp_path)
        again = pretrain.run(config(folder, f"adapt.retrieval.{setting}"), out)
        assert again.digest != Artifact.load(finished / "pretrain").digest

    def test_other_weights_in_the_folder_of_the_bert_make_it_anew(self, folder, tmp_path):
        shutil.copytree(folder / "bert", tmp_path / "bert")
        mine = config(folder, f"adapt.text={tmp_path / 'bert'}", "pretrain.epochs=1")
        prepare.run(mine, tmp_path / "run")
        before = pretrain.run(mine, tmp_path / "run")
        shutil.rmtree(tmp_path / "bert")
        write_tiny_bert(tmp_path / "bert", seed=5)
        assert pretrain.run(mine, tmp_path / "run").digest != before.digest


class TestObjectivesThatTrainNotAll:
    @pytest.mark.parametrize(
        ("objectives", "towers", "left"),
        [
            ("{mlm = 1.0}", set(), ("items", "users")),
            ("{vae = 1.0}", {"candidate_tower"}, ("users",)),
        ],
    )
    def test_what_was_not_trained_is_not_kept(
        self, folder, finished, tmp_path, objectives, towers, left
    ):
        out = tmp_path / "run"
        out.mkdir()
        (out / "prepare").symlink_to(finished / "prepare")
        some = config(folder, "adapt.encoder=pretrain", "pretrain.epochs=1", objectives=objectives)
        pretrain.run(some, out)
        kept = {name.split(".")[0] for name in PretrainedEncoder.load(out / "pretrain").weights}
        assert kept == towers
        for what in left:
            with pytest.raises(InputError, match=f"vectors of {what}; take --space text"):
                encode.run(out / "pretrain", what)
        made = adapt.run(some, out, "retrieval")
        names = json.loads(made.file("model.json").read_text())["pretrained"]
        assert {name.split(".")[0] for name in names} == towers


class TestWhatTheDataCannotSupport:
    def test_texts(self, folder, finished, tmp_path):
        bad = board.config(folder / "files", *TINY, "pretrain.objectives={text_history = 1.0}")
        with pytest.raises(InputError, match="'text_history' reads texts"):
            pretrain.run(bad, copy(finished, tmp_path))

    @pytest.mark.parametrize("text", ["none", "bert"])
    def test_texts_for_pairs(self, folder, tmp_path, text):
        """Nobody met the only item with a title."""
        files = shutil.copytree(folder / "files", tmp_path / "files")
        ids = [row.split(",")[0] for row in (files / "items.csv").read_text().splitlines()[1:]]
        rows = ["item_id,title", *(f"{item}," for item in ids), "unmet,war"]
        (files / "items.csv").write_text("\n".join(rows))
        named = folder / "bert" if text == "bert" else text
        given = (f"data.interactions={files / 'events.csv'}", f"data.items={files / 'items.csv'}")
        more = (f"adapt.text={named}", "pretrain.train_text=true", "data.item_attributes=[]")
        bad = config(folder, *given, *more, objectives="{contrastive = 1.0}")
        prepare.run(bad, tmp_path / "run")
        with pytest.raises(InputError, match="reads the texts of items that users met"):
            pretrain.run(bad, tmp_path / "run")

    def test_single_events(self, folder, tmp_path):
        files = board.write(tmp_path / "files", items=10)
        given = (f"data.interactions={files / 'events.csv'}", f"data.items={files / 'items.csv'}")
        bad = config(folder, *given, objectives="{contrastive = 1.0}")
        prepare.run(bad, tmp_path / "run")
        with pytest.raises(InputError, match="'contrastive' needs users with at least two"):
            pretrain.run(bad, tmp_path / "run")

    def test_no_objective(self, folder, finished, tmp_path):
        with pytest.raises(ConfigError, match="gives no objective a weight"):
            pretrain.run(config(folder, objectives="{masked = 0.0}"), copy(finished, tmp_path))


def test_a_loss_that_is_no_number_stops_and_says_where(folder, finished, tmp_path):
    from tfrec.training import TrainingDivergedError

    wild = config(
        folder,
        "pretrain.learning_rate=1.0",
        "pretrain.clip_norm=0.0",
        "pretrain.epochs=200",
        "adapt.retrieval.temperature=1e-30",
    )
    with pytest.raises(TrainingDivergedError, match=r"loss of .* in step \d+; .* begins anew"):
        pretrain.run(wild, copy(finished, tmp_path))
