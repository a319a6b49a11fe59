"""The command line: parse, make a Config, run one stage, print where the artifact is.

Everything that costs time is imported inside the verb that needs it: ``tfrec --help`` loads the
standard library alone.
"""

from __future__ import annotations

import argparse
import csv
import errno
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import tfrec
from tfrec.errors import InputError, SetupError, TfrecError

if TYPE_CHECKING:
    from tfrec.config import Config

DONE, BUG, BAD_INPUT, ENVIRONMENT, INTERRUPTED, NOBODY_READS = 0, 1, 2, 3, 130, 141

RANKERS = {"ranking": None, "multitask": [], "rating": ["rating"], "click": ["click"]}
"""What --task says of the ranker: the value of adapt.ranking.tasks; None: as it is configured."""

Handler = Callable[[argparse.Namespace], int]

_ENVIRONMENT_ERRNOS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew past the limit set for it",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EIO: "the disk failed",
    errno.EMFILE: "too many open files",
    errno.ENOMEM: "not enough memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: The arguments after ``tfrec``; those of the process if None.

    Returns:
      The exit code: 0 done, 1 a bug of ours, 2 bad input or configuration, 3 the environment,
      130 interrupted, 141 nobody reads our output any more.
    """
    if not sys.stderr.isatty():
        # A log file is read later: one line of a progress bar every ten seconds is enough.
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    try:
        arguments = parser().parse_args(argv)
        code: int = arguments.handler(arguments)
        sys.stdout.flush()
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001 - every ending has a code
        return _ending(error)
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each verb's namespace carries its ``handler``."""
    root = _Parser(
        prog="tfrec",
        description="From raw interactions and item texts to a recommender that reads with BERT.",
        epilog=_examples(
            ("set up, train, evaluate and show recommendations", "tfrec run movielens-100k"),
            (
                "the same on your own files",
                "tfrec run files --set data.interactions=events.csv --set data.items=items.csv",
            ),
            (
                "recommend for known users",
                "tfrec recommend saved_models/files --users users.csv --k 10 --out recs.csv",
            ),
        )
        + "\nexit codes: 0 done, 1 a bug of ours, 2 bad input or configuration,\n"
        "  3 the environment (network, disk, a missing extra), 130 interrupted",
    )
    root.add_argument("--version", action="version", version=f"tfrec {tfrec.__version__}")
    verbs = root.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    _add_stages(verbs)
    _add_merge(verbs)
    _add_compress(verbs)
    _add_export(verbs)
    _add_verify(verbs)
    _add_serve(verbs)
    _add_keys(verbs)
    _add_recommend(verbs)
    _add_encode(verbs)
    _add_data(verbs)
    _add_looks(verbs)
    return root


class _Parser(argparse.ArgumentParser):
    """One-line errors, no abbreviations (they break when an option is added)."""

    def __init__(self, **settings: object) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"tfrec: error: {message}; see `{self.prog} --help`\n")


if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[_Parser]


def _examples(*pairs: tuple[str, str]) -> str:
    lines = [f"  # {why}\n  {command}" for why, command in pairs]
    return "examples:\n" + "\n".join(lines) + "\n"


def _add_set(verb: argparse._ActionsContainer, example: str) -> None:
    verb.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=f"change one setting, e.g. {example}; may be repeated",
    )


# --- the stages: run, prepare, adapt, evaluate, and tune over them -------------------------------


def _add_stages(verbs: Verbs) -> None:
    _add_stage(
        verbs,
        "run",
        _run,
        "every stage in order: prepare, adapt, evaluate, and three users shown",
        (
            ("MovieLens-100K, from nothing to a report", "tfrec run movielens-100k"),
            (
                "a configuration of your own, changed for once",
                "tfrec run my.toml --set adapt.epochs=5 --out runs/short",
            ),
            (
                "your own files",
                "tfrec run files --set data.interactions=events.csv "
                "--set data.items=items.csv --out runs/shop",
            ),
        ),
    )
    _add_stage(
        verbs,
        "prepare",
        _prepare,
        "read, check, clean and split the data: leaves DIR/prepare",
        (("a named data set", "tfrec prepare movielens-100k"),),
    )
    _add_stage(
        verbs,
        "pretrain",
        _pretrain,
        "learn from behaviour sequences without labels: leaves DIR/pretrain",
        (
            ("an encoder of MovieLens-1M", "tfrec pretrain movielens-1m"),
            (
                "by other objectives",
                "tfrec pretrain movielens-100k "
                "--set 'pretrain.objectives={masked = 1.0, vae = 0.2}'",
            ),
        ),
    )
    adapt = _add_stage(
        verbs,
        "adapt",
        _adapt,
        "train a model on prepared data: leaves DIR/adapt/retrieval or DIR/adapt/ranking",
        (
            ("the two-tower model", "tfrec adapt movielens-100k --task retrieval"),
            ("then the ranker", "tfrec adapt movielens-100k --task ranking"),
            ("or a ranker of ratings alone", "tfrec adapt movielens-100k --task rating"),
            (
                "the two-tower model from an encoder that another run pretrained",
                "tfrec adapt movielens-100k --task retrieval "
                "--from saved_models/movielens-1m/pretrain",
            ),
            (
                "the two-tower model, and few weights of the BERT with it",
                "tfrec adapt movielens-100k --task retrieval --tune lora --out runs/lora",
            ),
        ),
    )
    adapt.add_argument(
        "--task",
        required=True,
        choices=("retrieval", *RANKERS),
        help="retrieval: the two-tower; the others, which need it in DIR, train the ranker. "
        "ranking: to predict what adapt.ranking.tasks says; multitask: all that the data supports; "
        "rating, click: that alone",
    )
    adapt.add_argument(
        "--from",
        dest="encoder",
        metavar="ENCODER",
        help="a pretrained encoder to start from; same as --set adapt.encoder=ENCODER",
    )
    adapt.add_argument(
        "--tune",
        choices=("full", "head", "lora", "adapter", "prompt", "bitfit"),
        help="which pretrained weights move; same as --set adapt.tuning.text=METHOD "
        "--set adapt.tuning.behaviour=METHOD",
    )
    _add_stage(
        verbs,
        "evaluate",
        _evaluate,
        "measure the trained models beside the baselines: leaves DIR/evaluate",
        (("the report of a finished training", "tfrec evaluate movielens-100k"),),
    )
    _add_tune(verbs)


def _add_tune(verbs: Verbs) -> None:
    tune = _add_stage(
        verbs,
        "tune",
        _tune,
        "search for better settings by their validation NDCG@10: leaves DIR/tune",
        (
            ("twenty trials of the two-tower model", "tfrec tune movielens-100k"),
            (
                "go on with the same search, up to fifty trials or half an hour",
                "tfrec tune movielens-100k --trials 50 --timeout 1800",
            ),
            (
                "settings of your choice, in trials of at most 10 epochs",
                "tfrec tune my.toml --set tune.epochs=10 "
                "--set tune.space.adapt.retrieval.layers=[1,2,3]",
            ),
            ("the ranker", "tfrec tune movielens-100k --task ranking --trials 30"),
            (
                "what the best settings are worth on the test events",
                "tfrec run saved_models/movielens-100k/tune/best.toml",
            ),
        ),
    )
    tune.add_argument(
        "--task",
        choices=("retrieval", "ranking"),
        help="whose settings; same as --set tune.task=TASK",
    )
    tune.add_argument(
        "--trials",
        type=_positive,
        metavar="N",
        help="trials in all, earlier ones counted; same as --set tune.trials=N",
    )
    tune.add_argument(
        "--timeout",
        type=_positive,
        metavar="SECONDS",
        help="begin no further trial after so long; same as --set tune.timeout=SECONDS",
    )


def _add_stage(
    verbs: Verbs, name: str, handler: Handler, purpose: str, examples: Sequence[tuple[str, str]]
) -> _Parser:
    verb = verbs.add_parser(
        name,
        help=purpose,
        description=purpose[0].upper() + purpose[1:] + ".",
        epilog=_examples(*examples) + "\nevery key of --set: docs/configuration.md",
    )
    verb.set_defaults(handler=handler)
    verb.add_argument(
        "config", metavar="CONFIG", help="a preset, a .toml file, or the word `files`"
    )
    _add_set(verb, "adapt.epochs=5")
    verb.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the run's folder, where earlier stages are found too (saved_models/<name>)",
    )
    verb.add_argument(
        "--data-dir",
        metavar="DIR",
        help="a folder that already holds the raw files; same as --set data.data_dir=DIR",
    )
    verb.add_argument("--seed", type=int, metavar="N", help="same as --set seed=N")
    verb.add_argument(
        "--force", action="store_true", help="make it again even where nothing has changed"
    )
    return verb


def _config(arguments: argparse.Namespace) -> tuple[Config, Path]:
    from tfrec.config import Config

    settings = list(arguments.settings)
    if method := getattr(arguments, "tune", None):
        settings[:0] = [f"adapt.tuning.{part}={method}" for part in ("text", "behaviour")]
    if arguments.data_dir is not None:
        settings.append(f"data.data_dir={json.dumps(arguments.data_dir)}")
    if arguments.seed is not None:
        settings.append(f"seed={arguments.seed}")
    config = Config.load(arguments.config, settings)
    return config, arguments.out or Path("saved_models") / config.name


def _run(arguments: argparse.Namespace) -> int:
    config, out = _config(arguments)
    from tfrec import pipeline
    from tfrec.stages import evaluate

    last = pipeline.run(config, out, force=arguments.force)
    if last.kind == "report":
        print(evaluate.summary(last))
    return _made(out)


def _prepare(arguments: argparse.Namespace) -> int:
    config, out = _config(arguments)
    from tfrec.stages import prepare

    artifact = prepare.run(config, out, force=arguments.force)
    print("\n".join(prepare.summary_lines(artifact)))
    return _made(artifact.path)


def _pretrain(arguments: argparse.Namespace) -> int:
    config, out = _config(arguments)
    from tfrec.stages import pretrain

    return _made(pretrain.run(config, out, force=arguments.force).path)


def _adapt(arguments: argparse.Namespace) -> int:
    if arguments.encoder is not None:
        arguments.settings.append(f"adapt.encoder={json.dumps(arguments.encoder)}")
    tasks = RANKERS.get(arguments.task)
    if tasks is not None:
        arguments.settings.append(f"adapt.ranking.tasks={json.dumps(tasks)}")
    config, out = _config(arguments)
    from tfrec.stages import adapt

    task: Literal["retrieval", "ranking"] = "ranking" if arguments.task in RANKERS else "retrieval"
    return _made(adapt.run(config, out, task, force=arguments.force).path)


def _evaluate(arguments: argparse.Namespace) -> int:
    config, out = _config(arguments)
    from tfrec.stages import evaluate

    report = evaluate.run(config, out, force=arguments.force)
    print(evaluate.summary(report))
    return _made(report.path)


def _tune(arguments: argparse.Namespace) -> int:
    for name in ("task", "trials", "timeout"):
        if (given := getattr(arguments, name)) is not None:
            arguments.settings.append(f"tune.{name}={given}")
    config, out = _config(arguments)
    from tfrec import tune

    found = tune.run(config, out, force=arguments.force)
    print(tune.summary(found))
    return _made(found.path)


def _made(path: Path) -> int:
    print(path)
    return DONE


# --- merge ---------------------------------------------------------------------------------------


def _add_merge(verbs: Verbs) -> None:
    purpose = "make an adapted model complete in itself, without its base"
    verb = verbs.add_parser(
        "merge",
        help=purpose,
        description="Write an adapted two-tower as an artifact that holds its BERT, with the "
        "changes of lora folded into it, and gives the same vectors without the base.",
        epilog=_examples(
            ("the retrieval model of a run", "tfrec merge runs/lora --to merged/lora"),
        ),
    )
    verb.set_defaults(handler=_merge)
    verb.add_argument(
        "source", metavar="DIR", type=Path, help="a run's folder, or a retrieval artifact's"
    )
    verb.add_argument(
        "--to", required=True, type=Path, metavar="DIR", help="the folder of the new artifact"
    )


def _merge(arguments: argparse.Namespace) -> int:
    from tfrec.stages import merge

    return _made(merge.run(arguments.source, arguments.to).path)


# --- compress ------------------------------------------------------------------------------------


def _add_compress(verbs: Verbs) -> None:
    purpose = "make a finished run smaller and faster, and measure what that costs"
    verb = verbs.add_parser(
        "compress",
        help=purpose,
        description="Prune a finished run's models, leave out parts of its BERT, or teach a "
        "smaller one, with the trained models as teachers; then export each result, measure its "
        "size, speed and quality beside the model as it was, and choose the smallest within a "
        "budget. Without a way to make it smaller, the usual ones are tried. What comes of one is "
        "again a run, in compress/ of the run's folder.",
        epilog=_examples(
            ("try the usual ways and choose", "tfrec compress saved_models/movielens-100k"),
            (
                "choose by a budget",
                "tfrec compress runs/a --max-loss 1% --max-size 30MB --max-latency 3ms",
            ),
            ("half of the weights zero, and int8", "tfrec compress runs/a --prune 0.5 --int8"),
            (
                "half of the heads and neurons left out",
                "tfrec compress runs/a --heads 6 --neurons 768",
            ),
            ("a student of 3 layers, 192 wide", "tfrec compress runs/a --student 3x192"),
            ("a third of the vocabulary", "tfrec compress runs/a --vocabulary 10000"),
        )
        + "\nevery key of --set: docs/configuration.md, section [compress]",
    )
    verb.set_defaults(handler=_compress)
    verb.add_argument("folder", metavar="DIR", type=Path, help="the run's folder")
    how = verb.add_argument_group("how")
    how.add_argument(
        "--prune", metavar="SHARE", help="share of the kernels' weights made zero, e.g. 0.5"
    )
    how.add_argument(
        "--pattern",
        choices=("unstructured", "block", "2:4"),
        help="which weights: any, four in a row, two of every four (compress.pattern)",
    )
    for name, what in (
        ("layers", "the BERT's layers that stay"),
        ("heads", "attention heads of each layer that stay"),
        ("neurons", "feed-forward neurons of each layer that stay"),
        ("vocabulary", "the BERT's tokens that stay; other words are cut into smaller pieces"),
    ):
        how.add_argument(f"--{name}", metavar="N", help=f"{what} (compress.{name})")
    how.add_argument(
        "--student",
        metavar="LAYERSxWIDTH",
        help="a BERT of so many layers and so wide inside, e.g. 3x192; sets both",
    )
    how.add_argument(
        "--int8",
        action=argparse.BooleanOptionalAction,
        help="whether the text encoder has int8 weights in the end (yes)",
    )
    how.add_argument(
        "--qat",
        action="store_true",
        help="towers and ranker learn to work with int8 kernels (compress.qat)",
    )
    _add_set(how, "compress.updates=2000")
    how.add_argument("--seed", metavar="N", help="same as --set seed=N")
    budget = verb.add_argument_group("the budget")
    budget.add_argument(
        "--max-loss",
        metavar="SHARE",
        type=_share,
        help="of NDCG@10 on test events, and of NDCG@20 of new items (1%% if no bound is given)",
    )
    budget.add_argument("--max-size", metavar="SIZE", type=_size, help="of the bundle, e.g. 30MB")
    budget.add_argument(
        "--max-latency", metavar="TIME", type=_milliseconds, help="to read one text, e.g. 3ms"
    )


def _compress(arguments: argparse.Namespace) -> int:
    from tfrec.config import of_run

    settings = list(arguments.settings)
    for name in ("prune", "layers", "heads", "neurons", "vocabulary"):
        if getattr(arguments, name) is not None:
            settings.append(f"compress.{name}={getattr(arguments, name)}")
    if arguments.pattern is not None:
        settings.append(f"compress.pattern={json.dumps(arguments.pattern)}")
    if arguments.qat:
        settings.append("compress.qat=true")
    if arguments.int8 is not None:
        settings.append(f"compress.int8={json.dumps(arguments.int8)}")
    if arguments.student is not None:
        layers, _, width = arguments.student.partition("x")
        if not (layers.isdigit() and width.isdigit()):
            raise InputError(f"--student {arguments.student} is not LAYERSxWIDTH, such as 3x192")
        settings += [f"compress.layers={layers}", f"compress.width={width}"]
    if arguments.seed is not None:
        settings.append(f"seed={arguments.seed}")
    config = of_run(arguments.folder, ("name", "seed", "compress", "evaluate"), settings)
    from tfrec.report.proof import Budget
    from tfrec.stages import compress

    bounds = (arguments.max_loss, arguments.max_size, arguments.max_latency)
    budget = Budget(*bounds) if any(bound is not None for bound in bounds) else None
    made = compress.run(config, arguments.folder, budget)
    print(compress.summary(made))
    if reason := compress.missed(made):
        raise InputError(reason)
    return _made(made.path)


def _share(text: str) -> float:
    value = _number(text, {"%": 0.01, "": 1.0}, "a share such as 1% or 0.01")
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share below 1, such as 1% or 0.01")
    return value


def _size(text: str) -> int:
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return int(_number(text, units, "a size such as 30MB"))


def _milliseconds(text: str) -> float:
    return _number(text, {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}, "a time such as 3ms")


def _number(text: str, units: Mapping[str, float], what: str) -> float:
    """A number with one of the units, times that."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([^0-9.\s]*)\s*", text)
    unit = None
    if found:
        lower = {name.lower(): factor for name, factor in units.items()}
        unit = lower.get(found[2].lower())
    if found is None or unit is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not {what}")
    return float(found[1]) * unit


# --- export and verify ---------------------------------------------------------------------------


def _add_export(verbs: Verbs) -> None:
    purpose = "put a finished run into a bundle that any server can run"
    verb = verbs.add_parser(
        "export",
        help=purpose,
        description="Write a finished run as a new version of a bundle: models that run without "
        "TensorFlow, the index, the catalog, the known users' histories and golden answers. The "
        "versions before it stay, and nothing changes until all of the new one is there.",
        epilog=_examples(
            ("a run", "tfrec export saved_models/movielens-100k --to bundles/movielens"),
            (
                "without the users and their histories",
                "tfrec export runs/a --to bundles/a --no-users",
            ),
        ),
    )
    verb.set_defaults(handler=_export)
    verb.add_argument("folder", metavar="DIR", type=Path, help="the run's folder")
    verb.add_argument("--to", required=True, type=Path, metavar="BUNDLE", help="the bundle")
    verb.add_argument(
        "--users",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the known users and their histories are part of it (yes); older versions "
        "keep theirs until --keep removes them",
    )
    verb.add_argument(
        "--int8",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the text encoder, the vectors and the linear model are int8 (yes); else "
        "float32, four times as large",
    )
    verb.add_argument(
        "--saved-models",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether SavedModels for TensorFlow Serving are part of it (yes)",
    )
    verb.add_argument(
        "--keep", type=_positive, default=3, metavar="N", help="versions that are kept (3)"
    )


def _export(arguments: argparse.Namespace) -> int:
    from tfrec.stages import export

    made = export.run(
        arguments.folder,
        arguments.to,
        users=arguments.users,
        int8=arguments.int8,
        saved_models=arguments.saved_models,
        keep=arguments.keep,
    )
    return _made(made.path)


def _add_verify(verbs: Verbs) -> None:
    purpose = "check a bundle: every byte, and that its models answer as the trained ones did"
    verb = verbs.add_parser(
        "verify",
        help=purpose,
        description="Check every byte of a version and of what stands beside the versions, and ask "
        "its models the questions whose answers by the trained models are stored in it.",
        epilog=_examples(
            ("the newest version", "tfrec verify bundles/movielens"),
            (
                "and a TensorFlow Serving that runs it",
                "tfrec verify bundles/movielens --tf-serving localhost:8500",
            ),
        ),
    )
    verb.set_defaults(handler=_verify)
    verb.add_argument("folder", metavar="BUNDLE", type=Path, help="the bundle")
    verb.add_argument("--version", type=_positive, metavar="N", help="which version (the newest)")
    verb.add_argument(
        "--tf-serving",
        metavar="HOST:PORT",
        help="ask the same of a TensorFlow Serving, by gRPC there and by REST at the next port",
    )
    verb.add_argument("--rest", metavar="HOST:PORT", help="where its REST API is instead")


def _verify(arguments: argparse.Namespace) -> int:
    from tfrec.stages import verify

    found = verify.run(arguments.folder, arguments.version, arguments.tf_serving, arguments.rest)
    for finding in found:
        bound = "" if finding.bound is None else f"  (bound {finding.bound:g})"
        state = "ok  " if finding.ok else "FAIL"
        print(f"{state}  {finding.model}: {finding.measure} {finding.value:.6f}{bound}")
    bad = sum(not finding.ok for finding in found)
    print(f"{len(found) - bad} of {len(found)} hold" if bad else "every digest and answer holds")
    return BAD_INPUT if bad else DONE


# --- serve ---------------------------------------------------------------------------------------


def _add_serve(verbs: Verbs) -> None:
    purpose = "run a bundle: recommendations by HTTP, and a page"
    verb = verbs.add_parser(
        "serve",
        help=purpose,
        description="Answer requests with a bundle, learn from each event at once, and show a "
        "page. Prints the address when it is ready; ends after SIGTERM or Ctrl-C, once what is "
        "under way is answered.",
        epilog=_examples(
            ("on this machine alone", "tfrec serve bundles/movielens"),
            (
                "for others, who need a key",
                "tfrec serve bundles/movielens --host 0.0.0.0 --port 80 --state /var/lib/tfrec",
            ),
            (
                "several servers with one Redis",
                "tfrec serve bundles/movielens --state redis://localhost:6379/0",
            ),
        )
        + "\nkeys of --set: serve.* in docs/configuration.md",
    )
    verb.set_defaults(handler=_serve)
    verb.add_argument("folder", metavar="BUNDLE", type=Path, help="the bundle")
    verb.add_argument("--host", help="address to listen on (127.0.0.1: this machine alone)")
    verb.add_argument("--port", help="port to listen on; 0: any that is free (8080)")
    verb.add_argument(
        "--state",
        metavar="DIR",
        help="folder for events and items, or redis://HOST:PORT/DB (BUNDLE.state)",
    )
    verb.add_argument(
        "--engine", metavar="ADDRESS", help="litert, or tf-serving://HOST:PORT (litert)"
    )
    _add_set(verb, "serve.exposures=false")


def _serve(arguments: argparse.Namespace) -> int:
    from tfrec.config import Config

    told = [
        f"serve.{name}={json.dumps(value) if name != 'port' else value}"
        for name in ("host", "port", "state", "engine")
        if (value := getattr(arguments, name)) is not None
    ]
    settings = Config.load("files", [*arguments.settings, *told]).serve
    # NumPy's products here are small: threads for them cost more than they save, and take the
    # cores from the models. It reads this when it is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Arrow's own pool keeps what reading a bundle took; the system's gives it back.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    try:
        from tfrec.serving.server import serve
    except ModuleNotFoundError as error:
        raise SetupError(
            f"serving needs the package {error.name}; install it with: pip install 'tfrec[serve]'"
        ) from None
    return serve(arguments.folder, settings)


# --- keys ----------------------------------------------------------------------------------------


def _add_keys(verbs: Verbs) -> None:
    purpose = "make, list or revoke the API keys of a server"
    verb = verbs.add_parser(
        "keys",
        help=purpose,
        description="Make, list or revoke the API keys of a server. A running server sees the "
        "change within a second.",
        epilog=_examples(
            (
                "a key for a web shop, which tells what people do",
                "tfrec keys create --role write --label shop "
                "--file bundles/movielens.state/keys.json",
            ),
            ("who has one", "tfrec keys list --file bundles/movielens.state/keys.json"),
        ),
    )
    actions = verb.add_subparsers(
        dest="action", metavar="ACTION", required=True, parser_class=_Parser
    )
    create = actions.add_parser(
        "create",
        help="make a key and print it, this once",
        description="Make a key and print it, this once: the file holds its hash alone.",
        epilog=_examples(
            ("for one who runs the server", "tfrec keys create --role admin --file keys.json"),
        ),
    )
    create.set_defaults(handler=_keys_create)
    create.add_argument(
        "--role",
        required=True,
        choices=("read", "write", "admin"),
        help="read: recommendations and search; write: events and items too; admin: everything",
    )
    create.add_argument("--label", default="", metavar="TEXT", help="whose it is or what for")
    listing = actions.add_parser(
        "list",
        help="ids, roles, dates and labels; never the keys themselves",
        epilog=_examples(("who has a key", "tfrec keys list --file keys.json")),
    )
    listing.set_defaults(handler=_keys_list)
    revoke = actions.add_parser(
        "revoke",
        help="take a key out for good",
        epilog=_examples(("by its id", "tfrec keys revoke 1f0c9a77d2e4 --file keys.json")),
    )
    revoke.set_defaults(handler=_keys_revoke)
    revoke.add_argument("id", metavar="ID", help="an id from `tfrec keys list`")
    for action in (create, listing, revoke):
        action.add_argument(
            "--file",
            required=True,
            type=Path,
            help="the server's file of keys: serve.keys, or keys.json in the folder of its state",
        )


def _keys_create(arguments: argparse.Namespace) -> int:
    from tfrec.serving.keys import Keys

    print(Keys(arguments.file).create(arguments.role, arguments.label))
    print(f"the key is not shown again; its hash is in {arguments.file}", file=sys.stderr)
    return DONE


def _keys_list(arguments: argparse.Namespace) -> int:
    from tfrec.serving.keys import Keys

    for key in Keys(_existing(arguments.file)).listing():
        print(f"{key.id}  {key.role:<5}  {key.created}  {key.label}".rstrip())
    return DONE


def _keys_revoke(arguments: argparse.Namespace) -> int:
    from tfrec.serving.keys import Keys

    gone = Keys(_existing(arguments.file)).revoke(arguments.id)
    print(f"revoked {gone.id}  {gone.role}  {gone.label}".rstrip())
    return DONE


def _existing(file: Path) -> Path:
    if not file.exists():
        raise InputError(f"there is no file {file}; `tfrec keys create` makes one")
    return file


# --- recommend -----------------------------------------------------------------------------------


def _add_recommend(verbs: Verbs) -> None:
    purpose = "recommend items with a finished run"
    verb = verbs.add_parser(
        "recommend",
        help=purpose,
        description="Recommend items with a finished run, for users it knows, for a raw history, "
        "for a text about somebody, or for several of these together.",
        epilog=_examples(
            (
                "a file of users, one file of recommendations",
                "tfrec recommend saved_models/movielens-100k --users users.csv --k 10 "
                "--out recs.csv",
            ),
            ("one user, to the screen", "tfrec recommend saved_models/movielens-100k --user 42"),
            (
                "somebody who was never seen",
                'tfrec recommend saved_models/movielens-100k --history "50,181,172" '
                '--profile "space adventures" --format jsonl',
            ),
            (
                "some items only",
                "tfrec recommend saved_models/movielens-100k --user 42 --filter genres=Comedy "
                "--exclude 1,95",
            ),
        )
        + "\nCSV has the columns user_id,item_id,rank,score, best first",
    )
    verb.set_defaults(handler=_recommend)
    verb.add_argument("folder", metavar="DIR", type=Path, help="the folder of a run or a bundle")
    who = verb.add_argument_group("for whom")
    who.add_argument("--users", type=Path, metavar="FILE", help="a CSV file with a column user_id")
    who.add_argument(
        "--user",
        dest="user_ids",
        metavar="ID",
        action="append",
        default=[],
        help="one user id; may be repeated",
    )
    who.add_argument(
        "--history",
        type=_ids,
        metavar="IDS",
        help='item ids, oldest first, "id,id,id"; quote an id that holds a comma: \'"a,b",c\'',
    )
    who.add_argument("--profile", metavar="TEXT", help="what the person likes, in words")
    what = verb.add_argument_group("what")
    what.add_argument("--k", type=_positive, metavar="N", help="items for each user (recommend.k)")
    what.add_argument(
        "--exclude", type=_ids, metavar="IDS", action="extend", default=[], help="never these items"
    )
    what.add_argument(
        "--include", type=_ids, metavar="IDS", action="extend", default=[], help="only these items"
    )
    what.add_argument(
        "--filter",
        dest="filters",
        type=_filter,
        metavar="COLUMN=VALUE",
        action="append",
        default=[],
        help="only items with this attribute; repeated: the same column any of the values, "
        "several columns all of them",
    )
    what.add_argument(
        "--include-seen",
        action=argparse.BooleanOptionalAction,
        help="whether items of the history may come again (as recommend.exclude_seen says)",
    )
    where = verb.add_argument_group("where to")
    where.add_argument("--out", type=Path, metavar="FILE", help="a file instead of the screen")
    where.add_argument(
        "--format",
        choices=("csv", "jsonl"),
        help="csv unless the name of --out ends in .jsonl",
    )


def _recommend(arguments: argparse.Namespace) -> int:
    asked = (arguments.users, arguments.user_ids, arguments.history, arguments.profile)
    if all(part is None or part == [] for part in asked):
        raise InputError("nobody to recommend for: give --users, --user, --history or --profile")
    filters: dict[str, list[str]] = {}
    for column, value in arguments.filters:
        filters.setdefault(column, []).append(value)
    from tfrec.stages import recommend

    recommend.run(
        arguments.folder,
        users_file=arguments.users,
        user_ids=arguments.user_ids,
        history=arguments.history,
        profile=arguments.profile,
        exclude=arguments.exclude,
        include=arguments.include,
        filters=filters,
        include_seen=arguments.include_seen,
        k=arguments.k,
        out=arguments.out,
        format=_format(arguments.format, arguments.out),
    )
    return DONE if arguments.out is None else _made(arguments.out)


def _format(given: str | None, out: Path | None) -> Literal["csv", "jsonl"]:
    jsonl = given == "jsonl" or (given is None and out is not None and out.suffix == ".jsonl")
    return "jsonl" if jsonl else "csv"


def _ids(text: str) -> list[str]:
    found = next(csv.reader([text], skipinitialspace=True), [])
    return [stripped for one in found if (stripped := one.strip())]


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _filter(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals or not column.strip():
        raise argparse.ArgumentTypeError(f"'{text}' is not COLUMN=VALUE")
    return column.strip(), value.strip()


# --- encode --------------------------------------------------------------------------------------


def _add_encode(verbs: Verbs) -> None:
    verb = verbs.add_parser(
        "encode",
        help="write vectors of items, users or texts to a Parquet file",
        description="Write vectors of items, users or texts to a Parquet file, for other systems. "
        "The same command goes on after an interrupt.",
        epilog=_examples(
            ("candidate vectors", "tfrec encode saved_models/movielens-100k --what items"),
            (
                "query vectors of the users, from their histories",
                "tfrec encode saved_models/movielens-100k --what users --out users.parquet",
            ),
            (
                "what the BERT makes of the texts of any file",
                "tfrec encode saved_models/movielens-100k --what texts --texts reviews.csv "
                "--column body",
            ),
            (
                "of the pretrained encoder, adapted to nothing",
                "tfrec encode saved_models/movielens-100k/pretrain --what items",
            ),
        )
        + "\nthe columns, the metadata, texts that are empty: docs/encode.md",
    )
    verb.set_defaults(handler=_encode)
    verb.add_argument(
        "folder",
        metavar="DIR",
        type=Path,
        help="the run's folder, its adapt/retrieval, or its pretrain",
    )
    verb.add_argument(
        "--what", required=True, choices=("items", "users", "texts"), help="what gets a vector"
    )
    verb.add_argument(
        "--space",
        choices=("towers", "text"),
        help="towers: whose inner product is the score of retrieval (items and users); "
        "text: the BERT's vectors",
    )
    verb.add_argument(
        "--cut",
        choices=("final", "test", "select"),
        default="final",
        help="which of the run's weights (final: trained on every event)",
    )
    texts = verb.add_argument_group("texts")
    texts.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="a .csv, .tsv, .jsonl, .parquet or .txt file (a text on each line), also with .gz",
    )
    texts.add_argument("--column", metavar="NAME", default="text", help="its texts (text)")
    texts.add_argument(
        "--id", metavar="NAME", help="its ids (item_id, user_id or id, where there is one)"
    )
    texts.add_argument(
        "--role",
        choices=("passage", "query"),
        default="passage",
        help="whether they are looked for (passage) or what looks (query), for models that ask",
    )
    where = verb.add_argument_group("where to")
    where.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a file named .parquet (in the folder encode of the run)",
    )
    where.add_argument(
        "--force", action="store_true", help="replace a file that holds other things"
    )


def _encode(arguments: argparse.Namespace) -> int:
    from tfrec.stages import encode

    made = encode.run(
        arguments.folder,
        arguments.what,
        texts=arguments.texts,
        column=arguments.column,
        id_column=arguments.id,
        space=arguments.space,
        role=arguments.role,
        cut=arguments.cut,
        out=arguments.out,
        force=arguments.force,
    )
    return _made(made)


# --- data ----------------------------------------------------------------------------------------


def _add_data(verbs: Verbs) -> None:
    purpose = "list or fetch the public data sets that have a name here"
    verb = verbs.add_parser(
        "data",
        help=purpose,
        description="List or fetch the public data sets that have a name here.",
        epilog=_examples(
            ("what there is", "tfrec data list"),
            ("get one into the cache", "tfrec data fetch movielens-100k"),
        ),
    )
    actions = verb.add_subparsers(
        dest="action", metavar="ACTION", required=True, parser_class=_Parser
    )
    listing = actions.add_parser(
        "list",
        help="names, sizes, where they are from",
        epilog=_examples(("what there is", "tfrec data list")),
    )
    listing.set_defaults(handler=_data_list)
    fetch = actions.add_parser(
        "fetch",
        help="download, check against known digests, cache",
        epilog=_examples(
            ("from the publisher", "tfrec data fetch movielens-1m"),
            ("check a copy you have", "tfrec data fetch movielens-1m --data-dir ~/ml-1m"),
        ),
    )
    fetch.set_defaults(handler=_data_fetch)
    fetch.add_argument("name", metavar="NAME", help="a name from `tfrec data list`")
    fetch.add_argument(
        "--data-dir", metavar="DIR", help="check the raw files of this folder instead"
    )


def _data_list(arguments: argparse.Namespace) -> int:
    from tfrec.data import sources

    print("\n".join(sources.listing()))
    return DONE


def _data_fetch(arguments: argparse.Namespace) -> int:
    from tfrec.data import sources

    return _made(sources.fetch(arguments.name, arguments.data_dir))


# --- inspect, doctor -----------------------------------------------------------------------------


def _add_looks(verbs: Verbs) -> None:
    inspect = verbs.add_parser(
        "inspect",
        help="say what an artifact is and check every byte of it",
        description="Say what an artifact is (kind, versions, parents, metrics, settings that "
        "are not the defaults, files) and check every file against its digest. A folder of "
        "artifacts, such as a whole run, shows each of them.",
        epilog=_examples(
            ("a whole run", "tfrec inspect saved_models/movielens-100k"),
            ("one stage of it", "tfrec inspect saved_models/movielens-100k/prepare"),
        ),
    )
    inspect.set_defaults(handler=_inspect)
    inspect.add_argument("folder", metavar="ARTIFACT", type=Path, help="the artifact's folder")
    doctor = verbs.add_parser(
        "doctor",
        help="check that this machine and its packages can do the work",
        description="Check that this machine and its packages can do the work; ends with 3 if "
        "something is broken.",
        epilog=_examples(
            ("before asking for help", "tfrec doctor"),
            (
                "is a run whole, and does the text model know its catalog's language?",
                "tfrec doctor saved_models/movielens-100k",
            ),
        ),
    )
    doctor.set_defaults(handler=_doctor)
    doctor.add_argument(
        "folder",
        metavar="DIR",
        type=Path,
        nargs="?",
        help="a run or an artifact: every byte is checked, and the texts of its items looked at",
    )


def _inspect(arguments: argparse.Namespace) -> int:
    from tfrec import inspect

    for line in inspect.describe(arguments.folder):
        print(line)
    return DONE


def _doctor(arguments: argparse.Namespace) -> int:
    from tfrec import doctor

    return _print_findings(doctor.diagnose(arguments.folder))


def _print_findings(findings: Iterable[tuple[str, str]]) -> int:
    code = DONE
    for status, line in findings:
        print(f"{status:>4}  {line}", flush=True)
        code = ENVIRONMENT if status == "fail" else code
    return code


# --- endings -------------------------------------------------------------------------------------


def _ending(error: BaseException) -> int:
    """Tells the user in one line how it ended; returns the exit code."""
    _empty_stdout()
    if isinstance(error, BrokenPipeError):
        return NOBODY_READS
    if os.environ.get("TFREC_DEBUG") == "1":
        traceback.print_exception(error)
    line, code = _explained(error)
    print(f"tfrec: {line}", file=sys.stderr)
    return code


def _empty_stdout() -> None:
    """Writes what is buffered, or gives it up: else the interpreter complains on its way out."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explained(error: BaseException) -> tuple[str, int]:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command continues where it can", INTERRUPTED
    if isinstance(error, TfrecError):
        return f"error: {error}", error.exit_code
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT_ERRNOS:
        where = f": {error.filename}" if error.filename else ""
        return f"error: {_ENVIRONMENT_ERRNOS[error.errno]}{where}", ENVIRONMENT
    if isinstance(error, MemoryError):
        return "error: not enough memory; smaller batches or fewer events need less", ENVIRONMENT
    if isinstance(error, ModuleNotFoundError) and not (error.name or "tfrec").startswith("tfrec"):
        return f"error: {error.name} is not installed; pip install 'tfrec[train]'", ENVIRONMENT
    kind = type(error).__name__
    return f"error: this is a bug of tfrec ({kind}: {_first_line(error)}); {_log(error)}", BUG


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:200]


def _log(error: BaseException) -> str:
    if os.environ.get("TFREC_DEBUG") == "1":
        return "the traceback is above"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="tfrec-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            log.write(f"tfrec {tfrec.__version__}, Python {sys.version}\n{sys.argv}\n\n")
            traceback.print_exception(error, file=log)
    except OSError:
        return "set TFREC_DEBUG=1 for the traceback"
    return f"please report it with {log.name}"


if __name__ == "__main__":
    sys.exit(main())
