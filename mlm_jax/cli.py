"""The command line: `mlm-jax VERB ...`. Nothing heavy is imported before a verb needs it. Exit status: status.py."""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import signal
import sys
import traceback
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mlm_jax import status
from mlm_jax.stopping import Stopped

if TYPE_CHECKING:
    from mlm_jax.runs import Loaded

STAGES = ("prepare", "train", "evaluate", "sample", "export", "report")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status; `--help` and wrong arguments leave by SystemExit, as argparse does."""
    args = parser().parse_args(argv)
    if args.verb not in (import_, export):  # these touch each of many large arrays once
        keep_freed_memory()
    ended = status.FAILED
    try:
        ended = _execute(args, sys.argv[1:] if argv is None else argv)
    finally:
        if ended and _several(args) and not getattr(args, "supervise", False):
            from mlm_jax import distributed

            distributed.leave(ended)
    return ended


def _several(args: argparse.Namespace) -> bool:
    """This process joins others. What looks at a machine leaves that to a process of its own, as JAX itself may be broken."""
    if args.verb is doctor:
        return False
    return getattr(args, "distributed", False) or any(getattr(args, name, None) is not None for name in ("coordinator", "processes", "process"))


def _execute(args: argparse.Namespace, argv: list[str]) -> int:
    """Does what the arguments ask for; returns the exit status."""
    from mlm_jax.config import InputError

    try:
        if getattr(args, "supervise", False):
            return _supervise(args, argv)
        leads, stdout = True, sys.stdout
        if getattr(args, "distributed", False) and (args.coordinator, args.processes, args.process) != (None, None, None):
            raise InputError("--distributed", "", "detects what --coordinator, --processes and --process say", "Leave it out, or them")
        if _several(args):
            from mlm_jax import distributed

            timeout = distributed.TIMEOUT_S if args.join_timeout is None else args.join_timeout
            distributed.start(args.coordinator, args.processes, args.process, timeout=timeout)
            leads, stdout = distributed.leads(), os.fdopen(os.dup(1), "w")
            os.dup2(2, 1)  # gloo greets its peers on stdout
        result = args.verb(args)
        if args.json and leads:
            print(json.dumps(result), file=stdout, flush=True)
        return status.FAILED if args.verb is doctor and result["failed"] else status.DONE
    except (Exception, KeyboardInterrupt) as e:
        ended, line = _ending(e, args)
        with contextlib.suppress(OSError):  # of a log on a full disk
            if args.traceback and ended != status.STOPPED:
                traceback.print_exc()
            typed = "\n" if isinstance(e, KeyboardInterrupt) else ""  # the terminal shows ^C
            print(f"{typed}mlm-jax: {line}", file=sys.stderr)
        return ended


def _ending(error: BaseException, args: argparse.Namespace) -> tuple[int, str]:
    """The exit status after `error`, and what is said of it."""
    from mlm_jax.config import InputError

    words, goes_on = " ".join(str(error).split())[:500], ""
    if "experiment" in args and args.verb is not plan:
        goes_on = "; the same command goes on from the last checkpoint"
    if _several(args):
        from mlm_jax import distributed

        if distributed.lost(error):
            return status.LOST, f"another process of this run is gone ({words}){goes_on}"
    match error:
        case InputError():
            return status.BAD_INPUT, str(error)
        case Stopped():
            return status.STOPPED, str(error)
        case KeyboardInterrupt():
            return status.SIGNALLED + signal.SIGINT, f"interrupted{goes_on}"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return status.FAILED, f"{error.filename or 'a file'} could not be written: {error.strerror}; free some space{goes_on}"
        case _ if type(error).__module__.startswith("mlm_jax."):  # ours says it all
            return status.FAILED, words
        case _:
            hint = "" if args.traceback else " (--traceback shows where)"
            return status.FAILED, f"{type(error).__name__}: {words}{hint}"


def keep_freed_memory() -> None:
    """Lets the C library reuse freed memory rather than hand it back: XLA's CPU buffers of one step are the next step's.

    Without it a small model on a CPU spends a third of its time in page faults. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:  # the GNU C library
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        mallopt(m_arena_max, 1)  # else what a thread of XLA asks for, if it is large, is not from the heap and goes back
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)  # without a limit, which an int of bytes would be


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    from mlm_jax.config import ChatConfig, SampleConfig

    top = Parser(prog="mlm-jax", description="Train GPT-2 in JAX: raw text to a trained, evaluated, talking, exported model.")
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout; everything else goes to stderr")
    common.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    verbs = top.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", parents=[common])
        sub.set_defaults(verb=function)
        return sub

    for name, function, text in (
        ("run", run, "prepare, train, evaluate, sample, export and report; skips what is done, resumes what is not"),
        ("prepare", prepare, "turn the experiment's text into token shards"),
        ("train", train, "prepare and train, going on from the last checkpoint"),
    ):
        sub = verb(name, function, text)
        sub.add_argument("experiment", metavar="EXPERIMENT", help="a file (experiments/tiny.py) or a module (experiments.tiny)")
        sub.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field, e.g. --set optim.peak_lr=3e-4; repeatable")
        sub.add_argument("--out", type=Path, metavar="DIR", help="the run directory, or gs://BUCKET/FOLDER (default: runs/NAME)")
        if function is not prepare:
            sub.add_argument(
                "--from",
                dest="origin",
                default="",
                metavar="RUN[@STEP]",
                help="fork: begin a new run from a checkpoint of another; @best is that with the lowest validation loss",
            )
            sub.add_argument("--supervise", action="store_true", help="start it again whenever it fails, but for bad input, until it is done")
            sub.add_argument("--profile", default="", metavar="FIRST:LAST", help="write a trace of these steps, both included, into profile/")
            sub.add_argument("--wandb", default="", metavar="PROJECT", help="send the figures to Weights & Biases too")
        _joining(sub)

    sub = verb("evaluate", evaluate, "measure a model's loss on its run's validation split, or on a text")
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("--text", metavar="SOURCE", help="a file or folder of text (default: the validation split of the run)")
    _int8(sub)
    _trust(sub)

    sub = verb("generate", generate, "continue a prompt, or several")
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("--prompt", action="append", metavar="TEXT", help="the text to continue; repeatable (default: the start of a document)")
    _settings(sub, SampleConfig, without=("prompt",))
    sub.add_argument("--stream", action="store_true", help="print the text as it is written")
    sub.add_argument("--scores", action="store_true", help="print the log-probability of each continuation, and why it ended")
    sub.add_argument("--draft", metavar="MODEL", help="a smaller model of the same tokenizer that guesses ahead (speculative decoding)")
    sub.add_argument("--drafted", type=int, metavar="N", help="how many tokens it guesses at a time (default 4)")
    _int8(sub)
    _trust(sub)

    sub = verb("chat", chat, "talk with a model in the terminal")
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _settings(sub, ChatConfig, without=("num", "beams", "length_penalty", "early_stopping", "forced"))
    _int8(sub)
    _trust(sub)

    sub = verb("import", import_, "turn a GPT-2 of Hugging Face, nanoGPT or minGPT into a run directory")
    sub.add_argument("model", metavar="MODEL", help="a Hugging Face directory, a hub name such as openai-community/gpt2, or a weight file")
    sub.add_argument("out", metavar="OUT", type=Path, help="the directory to write; it must not exist or be empty")
    sub.add_argument("--set", action="append", default=[], metavar="model.FIELD=VALUE", help="what the weights do not say, or pad; repeatable")
    sub.add_argument("--tokenizer", default="", metavar="DIR", help="a folder with the tokenizer, or gpt2, where there is none beside the weights")

    sub = verb("export", export, "write a model as a Hugging Face directory")
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("out", metavar="OUT_DIR", type=Path, help="the directory to write; it must not exist or be empty")
    _trust(sub)

    sub = verb("plan", plan, "say whether a train step fits a TPU slice, how long it takes and what it costs, before there is a TPU")
    sub.add_argument("experiment", metavar="EXPERIMENT", help="a file (experiments/tiny.py) or a module (experiments.tiny)")
    sub.add_argument(
        "--topology", required=True, metavar="SLICE", help="a mesh of chips (v5e:16x16) or an accelerator type (v5p-128); cpu or gpu: this machine"
    )
    sub.add_argument("--slices", type=int, default=1, metavar="N", help="so many of them, joined by the data center's network")
    sub.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field, e.g. --set mesh.fsdp=8; repeatable")
    sub.add_argument("--price", type=float, metavar="USD", help="of a chip-hour (default: the list price)")
    sub.add_argument("--search", action="store_true", help="try meshes, remat, micro-batches, attention and loss chunks, and rank what fits")
    sub.add_argument("--generate", action="store_true", help="plan the prefill and the decoding loop too, for sample.num rows")
    sub.add_argument("--cache", type=Path, default=Path("runs/plans"), metavar="DIR", help="where what was tried is kept (default runs/plans)")

    sub = verb("report", report, "write report.html and loss.png of a run")
    sub.add_argument("run", metavar="RUN", type=Path, help="a run directory")

    sub = verb("doctor", doctor, "look whether this machine, a bucket or a whole pod is fit to train; each fault comes with its remedy")
    sub.add_argument("--out", default="runs", metavar="DIR", help="where runs are to be written, or gs://BUCKET/FOLDER (default: runs)")
    sub.add_argument("--devices", type=int, metavar="N", help="how many devices all processes together should have")
    _joining(sub)
    return top


MODEL_HELP = "a run directory or gs://BUCKET/FOLDER, a checkpoint (RUN@STEP, or RUN@best by validation loss), a Hugging Face directory or a hub name"


def _joining(sub: argparse.ArgumentParser) -> None:
    """The flags that say which other processes there are."""
    sub.add_argument("--distributed", action="store_true", help="join the other processes of this run, as the TPU pod or Slurm says")
    sub.add_argument("--coordinator", metavar="HOST:PORT", help="where neither does: an address and a free port of process 0, with")
    sub.add_argument("--processes", type=int, metavar="N", help="how many processes there are, and")
    sub.add_argument("--process", type=int, metavar="I", help="which one this is, from 0 to N - 1")
    sub.add_argument("--join-timeout", type=float, metavar="SECONDS", help="how long to wait for the others (default 300)")


def _settings(sub: argparse.ArgumentParser, config: type, without: tuple[str, ...]) -> None:
    """A flag for each field of `config`."""
    for field in dataclasses.fields(config):
        if field.name in without:
            continue
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if field.type is bool:
            sub.add_argument(flag, action="store_true", default=None, help=text)
        elif typing.get_origin(field.type) is tuple:
            kind, _ = typing.get_args(field.type)
            sub.add_argument(flag, action="append", type=kind, metavar="ID" if kind is int else "TEXT", help=text)
        else:
            kind: Any = field.type
            metavar = {int: "N", float: "X"}.get(kind, "TEXT")
            sub.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default {field.default!r})")


def _given(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """The fields of `config` that the command line gives."""
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(config)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None}


def _trust(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--trust-code", action="store_true", help="execute the model code that came with the run")


def _int8(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--int8", action="store_true", help="round the weights to 8 bits")


def _load(args: argparse.Namespace, reference: str) -> "Loaded":
    from mlm_jax import runs
    from mlm_jax.model.int8 import int8

    loaded = runs.load(reference, trust_code=args.trust_code)
    return loaded._replace(params=int8(loaded.params)) if args.int8 else loaded


def _supervise(args: argparse.Namespace, argv: list[str]) -> int:
    """Runs the command in a process of its own, again and again until it is done; returns how it ended."""
    from mlm_jax import storage, supervise

    _, folder, home = _loaded(args)

    def progress() -> int:
        steps = [supervise.newest_step(folder)]
        if storage.is_in_bucket(home):  # only one of several processes writes figures into its folder
            from mlm_jax import checkpoint

            with contextlib.suppress(Exception):  # whatever the library raises where the bucket cannot be reached
                steps += checkpoint.steps_in(home / "checkpoints")
        return max(steps)

    return supervise.run(argv, progress)


def _loaded(args: argparse.Namespace) -> tuple[Any, Path, Any]:
    """The experiment of the arguments, its run directory on this machine, and where the run lives: there, or in a bucket."""
    from mlm_jax import experiment, storage
    from mlm_jax.config import parse_set

    loaded = experiment.load(args.experiment).with_changes(parse_set(args.set))
    home = storage.place(args.out or Path("runs") / loaded.config.name)
    return loaded, home if isinstance(home, Path) else Path("runs") / home.name, home


def _on_disk(field: str, path: Path) -> Path:
    """`path`. Raises InputError where it is in a bucket."""
    from mlm_jax import storage
    from mlm_jax.config import InputError

    place = storage.place(path)
    if storage.is_in_bucket(place):
        raise InputError(
            field, str(place), "is in a bucket", "Name a directory of this machine; a run itself keeps hf/ and report.html in its bucket"
        )
    return path


@contextlib.contextmanager
def _run(args: argparse.Namespace) -> Iterator[Any]:
    """The run of the arguments, in a directory that no other process uses meanwhile."""
    from mlm_jax import distributed, lock, runs

    loaded, folder, home = distributed.together(lambda: _loaded(args))
    with contextlib.ExitStack() as stack:
        distributed.together(lambda: stack.enter_context(lock.hold(folder)) if distributed.leads() else None)
        yield distributed.together(lambda: runs.Run(loaded, folder, home=home, origin=getattr(args, "origin", "")))


def run(args: argparse.Namespace) -> dict[str, Any]:
    with _run(args) as made:
        made.check(profile=args.profile)
        for stage in STAGES:
            getattr(made, stage)(**({"profile": args.profile, "wandb": args.wandb} if stage == "train" else {}))
        exported = ", hf/" if (made.folder / "hf").is_dir() else ""
        print(f"done: {made.home} (report.html, samples.txt{exported})", file=sys.stderr)
        return {"run": str(made.home), **made.evaluate()}


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    with _run(args) as made:
        manifest = made.prepare()
        return {"tokens": str(made.tokens), "vocab_size": manifest.vocab_size, **{name: split.tokens for name, split in manifest.splits.items()}}


def train(args: argparse.Namespace) -> dict[str, Any]:
    with _run(args) as made:
        made.check(profile=args.profile)
        made.prepare()
        made.train(profile=args.profile, wandb=args.wandb)
        return {"run": str(made.home), "step": made.config.train.steps}


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    from mlm_jax import evaluate, runs

    result = runs.evaluate_reference(args.model, text=args.text, trust_code=args.trust_code, int8=args.int8)
    if not args.json:
        print(evaluate.describe(result))
    return result


def generate(args: argparse.Namespace) -> dict[str, Any]:
    from mlm_jax.config import InputError, SampleConfig
    from mlm_jax.decode import text

    prompts = args.prompt or [""]
    args.prompt = None
    config = SampleConfig(**_given(args, SampleConfig))
    if args.stream and (len(prompts) > 1 or args.json or args.draft):
        raise InputError("--stream", "", "prints one text as it is written", "Give one --prompt, and neither --json nor --draft")
    if args.stream and args.scores:
        raise InputError("--scores", "", "of no use with --stream, which prints the text alone", "Leave one of them out")
    if args.drafted is not None and not args.draft:
        raise InputError("--drafted", args.drafted, "there is no model to guess", "Name one with --draft, or leave it out")
    loaded = _load(args, args.model)
    if args.stream:
        sys.stdout.write(prompts[0])
        for piece in text.stream(*loaded, prompts[0], **_given(args, SampleConfig)):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return {}
    draft = None
    if args.draft:
        small, small_params, _ = _load(args, args.draft)
        draft = text.Draft(small, small_params)
        draft = draft if args.drafted is None else draft._replace(drafted=args.drafted)
    found = text.generations(*loaded, prompts, config, draft=draft)
    rows = [(prompt, generation) for prompt, row in zip(prompts, found, strict=True) for generation in row]
    if not args.json:
        for i, (prompt, generation) in enumerate(rows, 1):
            scores = f"  {generation.ended_by}  {generation.logprob:.4f} nats"
            scores += "" if generation.score is None else f"  score {generation.score:.4f}"
            heading = f"--- {i}{scores if args.scores else ''}\n" if len(rows) > 1 or args.scores else ""
            print(heading + prompt + generation.text)
    return {"generations": [{"prompt": p, **g._asdict(), "tokens": g.tokens.tolist(), "logprobs": g.logprobs.tolist()} for p, g in rows]}


def chat(args: argparse.Namespace) -> dict[str, Any]:
    from mlm_jax.config import ChatConfig
    from mlm_jax.decode import chat

    settings = _given(args, ChatConfig)
    ChatConfig(**settings)  # what is wrong is said before the model is loaded
    model, params, tokenizer = _load(args, args.model)
    conversation = chat.Conversation(model, params, tokenizer, ChatConfig.fitting(model.config.context_len, **settings))
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        chat.chat(conversation)
    return {"turns": conversation.turns}


def import_(args: argparse.Namespace) -> dict[str, Any]:
    from mlm_jax import runs
    from mlm_jax.config import InputError, parse_set

    _on_disk("OUT", args.out)
    changes = parse_set(args.set)
    for path, value in changes.items():
        if not path.startswith("model."):
            raise InputError(path, value, "is no field of the model", "Set fields of the model alone, for example model.n_heads=12")
    settings = {path.removeprefix("model."): value for path, value in changes.items()}
    runs.import_model(args.model, args.out, settings=settings, tokenizer=args.tokenizer)
    print(f"done: {args.out}", file=sys.stderr)
    return {"run": str(args.out)}


def export(args: argparse.Namespace) -> dict[str, Any]:
    from mlm_jax import runs

    runs.export_model(args.model, _on_disk("OUT_DIR", args.out), trust_code=args.trust_code)
    print(f"done: {args.out}", file=sys.stderr)
    return {"hf": str(args.out)}


def plan(args: argparse.Namespace) -> dict[str, Any]:
    from mlm_jax import experiment
    from mlm_jax.config import InputError, parse_set
    from mlm_jax.plan import describe, generate, here, search, topology, tpu

    changes = parse_set(args.set)
    loaded = experiment.load(args.experiment).with_changes(changes)
    if args.topology in here.PLATFORMS:
        if args.search or args.slices != 1 or args.price is not None or args.generate:
            reason = "has neither slices nor a price, and neither search nor generation is planned for it"
            raise InputError("--topology", args.topology, reason, "Give a TPU slice for these")
        at_hand = here.plan(loaded.config, loaded.build, args.topology)
        if not args.json:
            print(here.describe(at_hand), end="")
        return at_hand.to_json()
    slice_ = topology.parse(args.topology, args.slices)
    if args.generate:
        generate.check(loaded.config)  # before minutes of compiling
    attempt = search.attempts(args.experiment, changes, args.topology, args.slices, _on_disk("--cache", args.cache))
    found = []
    if args.search:
        found = search.search(loaded.config, slice_, attempt, say=lambda line: print(line, file=sys.stderr, flush=True))
        loaded = loaded.with_changes(found[0].changes)
    try:
        made = tpu.plan(loaded.config, loaded.build, slice_, usd_per_chip_hour=args.price)
    except tpu.DoesNotFit as e:
        print(f"{e}; trying what would help", file=sys.stderr, flush=True)
        for line in e.largest:
            print(f"  {line}", file=sys.stderr)
        found = search.remedies(loaded.config, slice_, attempt)
        helps = "; or ".join(f"{' '.join(search.settings(one.changes))} ({one.cost})" for one in found)
        if args.json:
            sizes = {"need": e.need, "usable": e.usable, "largest": e.largest}
            print(json.dumps({"fits": False, **sizes, "remedies": [one._asdict() for one in found]}), flush=True)
        raise InputError("--topology", slice_.name, str(e), f"Give {helps}" if helps else "Take a larger slice, or a smaller batch") from e
    if not args.json:
        if found:
            best = search.settings(found[0].changes) or ["as it is"]
            print("\n".join(["Tried, the best first:", *map(str, found), "", "The best:", *best, ""]))
        print(describe.describe(made), end="", flush=True)
    more: dict[str, Any] = {"search": [one._asdict() for one in found]} if args.search else {}
    if args.generate:
        try:
            stages = generate.plan(loaded.config, loaded.build, slice_)
        except tpu.DoesNotFit as e:
            raise InputError("--generate", slice_.name, str(e), "Set a smaller sample.num, or more mesh.tensor, or take a larger slice") from e
        if not args.json:
            print(f"\n{generate.describe(stages, slice_)}", end="")
        more["generate"] = [stage.to_json() for stage in stages]
    return made.to_json() | more


def report(args: argparse.Namespace) -> dict[str, Any]:
    from mlm_jax.report import write_report

    return {"report": str(write_report(_on_disk("RUN", args.run)))}


def doctor(args: argparse.Namespace) -> dict[str, Any]:
    from mlm_jax.doctor.examine import examine
    from mlm_jax.doctor.findings import FAILED, Wanted, words

    given = {name: value for name in Wanted._fields if (value := getattr(args, name)) is not None}
    found = examine(Wanted(**given))
    if not args.json:
        print(words(found))
    return {"findings": [finding._asdict() for finding in found], "failed": sum(finding.state == FAILED for finding in found)}


if __name__ == "__main__":
    sys.exit(main())
