"""A run directory: what it records, the stages that fill it, and the one function that loads a model from it or from elsewhere.

config.json  run.json  code/  tokens/  tokenizer/  metrics.jsonl  tensorboard/  checkpoints/  evaluation.json  samples.txt  hf/
report.html  audit.html (of the text)
history.jsonl (every start, and what was changed then)  compiled/ (what XLA compiled, for the next start)  profile/ (traces)  wandb/

A run may live in a bucket: its checkpoints are written there, the rest is made in a directory of this machine and copied (`copies`).
Only compiled/, profile/, tensorboard/, wandb/ and the tokens of the training split stay here.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mlm_jax import checkpoint, copies, distributed, evaluate, experiment, huggingface, observe, report, sharding, storage
from mlm_jax import train as training
from mlm_jax.config import Config, DataConfig, InputError, MeshConfig, ModelConfig, diff, from_json, may_change, override, to_json
from mlm_jax.data import tokenizer as tokenizers
from mlm_jax.data.audit_page import write_audit
from mlm_jax.data.batches import training_batches, validation_windows
from mlm_jax.data.prepare import plain_texts
from mlm_jax.data.prepare import prepare as prepare_tokens
from mlm_jax.data.shards import Manifest, read_manifest
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.data.tokens import Tokens, open_tokens
from mlm_jax.decode import text as text_generation
from mlm_jax.experiment import Experiment
from mlm_jax.model import gpt2
from mlm_jax.model import int8 as quantized
from mlm_jax.objectives import documents_of
from mlm_jax.stopping import Stopped
from mlm_jax.storage import Place

PACKAGES = ("mlm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "tiktoken", "transformers", "numpy")


class Run:
    """One experiment in one directory. Each stage skips what is done; a stage that is cut off leaves nothing that looks done."""

    def __init__(
        self,
        exp: Experiment,
        folder: Path,
        *,
        home: Place | None = None,
        origin: str = "",
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        """`origin` is RUN, RUN@STEP or RUN@best: a new run goes on from that checkpoint, the newest where none is named, whatever its configuration.
        `home` is where the run lives, without one in `folder`, which has copies of its small files where that is a bucket.

        Raises:
          InputError: the directory holds a run of another configuration or origin, or other files; or there is no such checkpoint, or bucket.
        """
        self.experiment, self.folder, self.say = exp, folder, say
        self.home = folder if home is None else home
        copies.enter(folder, self.home, say=say)
        self.config = exp.config
        self.tokens = storage.place(self.config.data.tokens) if self.config.data.tokens else folder / "tokens"
        self.origin: Origin | None = None
        self.changes: dict[str, tuple[Any, Any]] = {}  # of the configuration, since the run was last started
        self._check_folder()
        self.origin = self._check_origin(origin)  # None where the run began from scratch

    def _check_origin(self, origin: str) -> "Origin | None":
        """Where the run began. Raises InputError where that is not `origin`, which may be "", or nothing is there to begin from."""
        if (self.home / "config.json").exists():
            recorded = read_json(self.home / "run.json").get("origin")
            began = Origin(**recorded) if recorded else None
            if origin and (began is None or _checkpoint_of(origin, began.step) != (storage.place(began.run), began.step)):
                reason = f"the run in {self.home} began from {f'{began.run}@{began.step}' if began else 'scratch'}"
                raise InputError("--from", origin, reason, "Leave it out to go on, or name a new directory with --out")
            return began
        if not origin:
            return None
        run, step = _checkpoint_of(origin)
        if not (run / "run.json").exists():
            raise InputError("--from", origin, "no run is there", "Name a run directory, or RUN@STEP")
        steps = checkpoint.steps_in(run / "checkpoints")
        step = max(steps, default=0) if step is None else step
        if step not in steps:
            there = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise InputError("--from", origin, f"no such checkpoint, {there}", "Name a step that it has, as RUN@STEP")
        if step >= self.config.train.steps:
            raise InputError("--from", origin, f"is at step {step} of train.steps = {self.config.train.steps}", "Train for more steps")
        changed = self._changes(read_config(run))
        return Origin(str(run), step, {field: list(values) for field, values in changed.items()})

    def _changes(self, there: Config) -> dict[str, tuple[Any, Any]]:
        """What is another in this run's configuration than `there`."""
        wanted = override(self.config, {"model.vocab_size": self.config.model.vocab_size or there.model.vocab_size})  # 0 took the tokenizer's
        return diff(there, wanted)

    def _check_folder(self) -> None:
        """Raises InputError where the directory is not this run's."""
        path = self.home / "config.json"
        if not path.exists():
            ours = {"tokens"} | (
                {"run.json", "code", "tokenizer", "audit.html"} if (self.home / "run.json").exists() else set()
            )  # of a start that was cut off
            others = sorted(p.name for p in self.home.iterdir() if p.name not in ours and p.name[0] != ".") if self.home.exists() else []
            if others:
                raise InputError("--out", str(self.home), f"holds {others[0]} and is no run", "Name a new directory")
            return
        there = read_config(self.home)
        changes = self._changes(there)
        others = {field: values for field, values in changes.items() if not may_change(field)}
        done = self._done()
        if others:
            raise InputError("--out", str(self.home), f"holds a run of another configuration ({_shown(others)})", "Name a new directory with --out")
        kept = {field: values for field, values in changes.items() if not field.startswith("mesh.")}  # a mesh changes nothing of what has ended
        if kept and done >= self.config.train.steps:
            remedy = f"Train for more than {done} train.steps, or name a new directory with --out"
            raise InputError("--out", str(self.home), f"holds a run that has ended at step {done} ({_shown(kept)})", remedy)
        self.changes = changes
        recorded = experiment.check_record(read_json(self.home / "run.json").get("experiment"), self.home)
        changed = experiment.changed_files(recorded, self.experiment)
        if changed and (recorded["structural"] or self.experiment.structural):
            remedy = "Restore it, or name a new directory with --out"
            raise InputError("EXPERIMENT", ", ".join(changed), f"changed since the run in {self.home} was started", remedy)
        if changed:
            self.say(f"note: {', '.join(changed)} changed since the run was started; the configuration is the same, so it goes on")

    def check(self, *, profile: str = "") -> None:
        """Raises InputError where the devices at hand cannot share the work as the configuration says, or no steps of `profile` are to come."""
        training.check_batches(self.mesh, self.config)
        self._traced(profile)

    def _done(self) -> int:
        """The step of the newest checkpoint, whole or not, or of the one that the run begins from; 0 without one."""
        return max(checkpoint.steps_in(self.home / "checkpoints"), default=self.origin.step if self.origin else 0)

    def _traced(self, profile: str) -> observe.Profile | None:
        done = self._done()
        return observe.Profile.parse(profile, done + 1, self.config.train.steps) if profile else None

    def prepare(self) -> Manifest:
        """Text to token shards; then the run's own files: configuration, provenance, tokenizer. Returns the manifest of the shards.

        Raises:
          InputError: the text cannot be used, or does not fit the model; nothing of a new run is left then.
        """
        new_folder, new_tokens = not self.folder.exists(), not self.tokens.exists()
        try:
            scratch = self.folder / "tokens"
            distributed.together(lambda: prepare_tokens(self.config.data, self.tokens, scratch=scratch) if distributed.leads() else None)
            manifest, tokenizer = distributed.together(self._read_tokens)
        except InputError as e:
            # Else the mended input would meet the shards of the bad one; where it asks for no others, they may have taken days.
            if distributed.leads() and not e.field.startswith(("sample.", "model.vocab_size", "data.mixture.")):
                if new_tokens and not self.config.data.tokens:
                    shutil.rmtree(self.tokens, ignore_errors=True)
                if new_folder and self.folder.is_dir() and not any(self.folder.iterdir()):
                    self.folder.rmdir()
            raise
        self.config = override(self.config, {"model.vocab_size": self.config.model.vocab_size or manifest.vocab_size})
        if new_tokens:
            parts = [f"{s.documents:,} documents, {s.bytes:,} bytes, {s.tokens:,} tokens for {name}" for name, s in manifest.splits.items()]
            self.say(f"prepare: {', '.join(parts)}")
            counts = manifest.audit["sources"].values()
            faults = sum(entry["documents"] for source in counts for entry in source["faults"].values())
            if faults:
                self.say(f"prepare: {faults:,} could not be read; audit.html says what and where")
        copies.claim(self.folder, self.home)
        if distributed.leads() and not (self.home / "config.json").exists():
            shutil.rmtree(self.folder / "code", ignore_errors=True)  # of a start that was cut off
            write_json(self.folder / "run.json", self.provenance())
            experiment.copy_code(self.experiment, self.folder)
            tokenizer.save(self.folder / "tokenizer")
            write_audit(manifest, self.folder)
            storage.write_text(self.folder / "config.json", to_json(self.config))  # last: a directory with a configuration is a run
        barrier("configuration")
        self._send_tokens(manifest)
        self._send(copies.PREPARED)
        observe.keep_compiled(self.folder / "compiled")
        return manifest

    def _read_tokens(self) -> tuple[Manifest, Tokenizer]:
        """The manifest and the tokenizer. Raises InputError where the tokens, or the prompt of the samples, do not fit the model."""
        manifest = read_manifest(self.tokens)
        tokenizer = _tokenizer_of(self.tokens)
        if self.origin and not _tokenizer_of(storage.place(self.origin.run)).same_as(tokenizer):
            remedy = "Use the same tokenizer, or data.tokens with shards of it"
            raise InputError("data.tokenizer", self.config.data.tokenizer, f"another one than that of {self.origin.run}", remedy)
        self._check_same_tokens(manifest)
        vocab_size, T = self.config.model.vocab_size, self.config.model.context_len
        if 0 < vocab_size < manifest.vocab_size:
            reason = f"smaller than the tokenizer's {manifest.vocab_size}"
            raise InputError("model.vocab_size", vocab_size, reason, "Set it to 0 to take the tokenizer's")
        training_batches(self.config, self.tokens)
        validation_windows(open_tokens(self.tokens, "val"), T)
        c = self.config.sample
        n_prompt = len(tokenizer.encode(c.prompt)) if c.prompt else 1
        if c.overflow == "refuse" and n_prompt + c.max_tokens > T:
            remedy = f"Ask for at most {T - n_prompt}" if n_prompt < T else "Shorten sample.prompt"
            raise InputError("sample.max_tokens", c.max_tokens, f"with {n_prompt} prompt tokens more than model.context_len = {T}", remedy)
        return manifest, tokenizer

    def _check_same_tokens(self, manifest: Manifest) -> None:
        """Raises InputError where the run, in its bucket, has been trained on other tokens, as of a text that is another on this machine."""
        there = self.home / "tokens"
        if not storage.is_in_bucket(there) or not ((self.home / "config.json").exists() and (there / "manifest.json").exists()):
            return
        with _at_hand(self.home, ["tokens/manifest.json"]) as run:
            if read_manifest(run / "tokens").sources != manifest.sources:
                reason = f"gives other tokens here than the run in {self.home} has been trained on"
                raise InputError("data.source", self.config.data.source, reason, "Copy those here, and name them with data.tokens")

    def provenance(self) -> dict[str, Any]:
        """What made this run: code, versions, machine."""
        device = jax.devices()[0].device_kind
        return ({"origin": self.origin._asdict()} if self.origin else {}) | {
            "experiment": experiment.record(self.experiment),
            "git_commit": git_commit(),
            "versions": versions(),
            "device": f"{jax.device_count()} x {device}",
            "parameters": gpt2.n_params(jax.eval_shape(lambda: gpt2.init(self.experiment.build(self.config.model), jax.random.key(0)))),
        }

    def train(self, *, profile: str = "", wandb: str = "") -> None:
        """Trains up to the last step, from the newest checkpoint on. `profile` is FIRST:LAST, `wandb` a project of Weights & Biases.

        Raises:
          InputError: `profile` names no steps that are still to come, or another machine has taken over the run in the bucket.
        """
        traced, newest = self._traced(profile), checkpoint.newest_whole(self.home / "checkpoints", say=self.say)
        if newest is None or newest < self.config.train.steps:
            model = self.experiment.build(self.config.model)
            origin = self.origin and storage.place(self.origin.run) / "checkpoints" / str(self.origin.step)
            note = distributed.together(lambda: copies.take(self.home) if distributed.leads() else "")

            def send_rows() -> None:
                distributed.together(lambda: copies.check_taken(self.home, note) if distributed.leads() else None)
                self._send(copies.ROWS)

            try:
                training.train(
                    self.config,
                    model,
                    self.tokens,
                    self.folder,
                    home=self.home,
                    origin=origin,
                    about=self._about(),
                    begin=self._begin,
                    before_save=send_rows,
                    profile=traced,
                    wandb=wandb,
                )
            except Stopped:
                send_rows()
                raise
        self._send(copies.ROWS)

    def _about(self) -> dict[str, Any]:
        """What each checkpoint says of the run."""
        return {"config": dataclasses.asdict(self.config), "git_commit": git_commit(), "versions": versions()}

    def _begin(self, done: int) -> dict[str, Any]:
        """The run goes on at step `done`: takes away what was made of an earlier end, writes the configuration; returns what the history holds."""
        copies.remove(self.folder, self.home, copies.ENDED)
        if self.changes:
            self.say(f"goes on from step {done} with {_shown(self.changes)}")
            storage.write_text(self.folder / "config.json", to_json(self.config))
            copies.send(self.folder, self.home, ["config.json"])
        return {"git_commit": git_commit(), "changed": self.changes}

    def evaluate(self) -> dict[str, Any]:
        """Loss over the whole validation split, and what xz needs for the same text, as evaluation.json holds them."""
        path = self.folder / "evaluation.json"
        if self._is_done(path):
            self._send([path.name])
            return read_json(self.home / path.name)
        model, params, tokenizer = self.trained
        split = read_manifest(self.tokens).splits["val"]
        tokens, documents = open_tokens(self.tokens, "val"), documents_of(self.config.data, tokenizer.eot_id)
        with jax.sharding.set_mesh(self.mesh):
            figures = {"n_bytes": split.bytes, "n_characters": split.characters}
            result = evaluate.measure(model, params, tokens, self.mesh, **figures, documents=documents)
        if distributed.leads():
            result |= evaluate.compressors(self.tokens, tokenizer)
            write_json(path, result)
        self._send([path.name])
        self.say(evaluate.describe(result))
        return result

    def sample(self) -> str:
        """Text that the trained model writes, as samples.txt holds it."""
        path, c = self.folder / "samples.txt", self.config.sample
        if self._is_done(path):
            self._send([path.name])
            return (self.home / path.name).read_text(encoding="utf-8")
        with jax.sharding.set_mesh(self.mesh):
            (found,) = text_generation.generations(*self.trained, [c.prompt], c)
        text = "".join(f"--- sample {i}\n{c.prompt}{generation.text}\n" for i, generation in enumerate(found, 1))
        if distributed.leads():
            storage.write_text(path, text)
        self._send([path.name])
        self.say(text)
        return text

    def export(self) -> Path | None:
        """The trained model as a Hugging Face directory, hf/; None where its structure is not GPT-2's."""
        folder = self.folder / "hf"
        if unlike := _unlike_gpt2(self.experiment.build(self.config.model)):
            self.say(f"export: skipped, Hugging Face's GPT-2 cannot express {unlike}")
            return None
        if not self._is_done(folder):
            params = on_host(self.trained.params)
            if distributed.leads():
                huggingface.export_weights(self.config.model, params, folder, tokenizer=self.trained.tokenizer)
        self._send([folder.name])
        return folder

    def report(self) -> Path:
        """The page that shows the run, report.html; it is drawn anew where what it shows is newer."""
        page = self.folder / "report.html"
        shown = [path for name in ("metrics.jsonl", "evaluation.json", "samples.txt") if (path := self.folder / name).is_file()]
        if distributed.leads() and not (page.is_file() and all(path.stat().st_mtime_ns <= page.stat().st_mtime_ns for path in shown)):
            report.write_report(self.folder)
        self._send(copies.SHOWN)
        return page

    def _is_done(self, path: Path) -> bool:
        """The stage that writes `path` is done. All decide alike, as one of them looks."""
        done = path.exists()
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(done))) if jax.process_count() > 1 else done

    def _send(self, names: Sequence[str]) -> None:
        """Copies what is new or changed of these files and folders to the bucket, if the run lives in one; all go on when that is done."""
        if storage.is_in_bucket(self.home):
            distributed.together(lambda: copies.send(self.folder, self.home, names) if distributed.leads() else None)

    def _send_tokens(self, manifest: Manifest) -> None:
        """Copies the manifest and the validation split to the bucket, if the run lives in one: any machine can evaluate it then.

        Tokens that are in a bucket themselves stay there, as do shards that others made.
        """
        tokens, there = self.tokens, self.home / "tokens"
        val = [shard for shard in manifest.splits["val"].shards if shard.file in manifest.files]
        names = ["manifest.json", *(shard.file for shard in val), *(shard.mask for shard in val if shard.mask_sha256)]

        def send() -> None:
            if isinstance(tokens, Path):
                copies.send(tokens, there, names)
            else:
                storage.write_text(there / "manifest.json", storage.read_text(tokens / "manifest.json"))

        if storage.is_in_bucket(self.home):
            distributed.together(lambda: send() if distributed.leads() else None)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh of this run over the devices at hand."""
        return sharding.make_mesh(self.config.mesh)

    @functools.cached_property
    def trained(self) -> "Loaded":
        """The newest checkpoint, on the mesh."""
        return load(self.home, build=self.experiment.build, mesh=self.mesh)


class Origin(NamedTuple):
    """Where a run began that was forked from another."""

    run: str  # where it lives
    step: int
    changed: dict[str, list[Any]]  # of the configuration


def _checkpoint_of(reference: str, default: int | None = None) -> tuple[Place, int | None]:
    """`_run_and_step` with the run's whole path, and `default` where no step is named."""
    folder, step = _run_and_step(reference)
    return storage.place(storage.address(folder)), default if step is None else step


def _shown(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """What `diff` found, in words."""
    return ", ".join(f"{field} {a!r} -> {b!r}" for field, (a, b) in changes.items())


class Loaded(NamedTuple):
    """A model that can be called: `model.apply({"params": params}, tokens_BT)`."""

    model: gpt2.Model
    params: Any
    tokenizer: Tokenizer


def load(
    reference: str | Place,
    *,
    trust_code: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    build: Callable[[ModelConfig], gpt2.Model] | None = None,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str | Path = "",
) -> Loaded:
    """The model of a run or a checkpoint (RUN/checkpoints/STEP), also in a bucket, or in a Hugging Face directory, a weight file, or by a hub name.

    The parameters come to the mesh, without one to the first device. `build` makes the model where the caller has the run's code.
    For weights of others, `settings` say what they do not tell (`huggingface.open_weights`), `tokenizer` is a folder with theirs, or
    gpt2, where there is none beside them.

    Raises:
      InputError: nothing is there, it is damaged, it needs code that is not trusted, or a setting or a tokenizer that it lacks.
    """
    if not _is_run(reference):
        source, tokens = _open_others(str(reference), settings, tokenizer)
        return Loaded(gpt2.GPT2(source.config), source.params(mesh or _first_device()), tokens)
    if settings or tokenizer:
        raise InputError("MODEL", str(reference), "a run, which has a configuration and a tokenizer of its own", "Leave out settings and tokenizer")
    model = _rebuild(reference, trust_code) if build is None else build(read_config(_run_and_step(reference)[0]).model)
    return _restore(reference, model, mesh or _first_device())


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _rebuild(reference: str | Place, trust_code: bool) -> gpt2.Model:
    """The model of a run."""
    folder, _ = _run_and_step(reference)
    recorded = read_json(folder / "run.json").get("experiment")
    return experiment.rebuild(recorded, read_config(folder).model, folder, trust_code=trust_code)


def _restore(reference: str | Place, model: gpt2.Model, place: jax.sharding.Mesh | jax.sharding.Sharding | None) -> Loaded:
    """A run's model with the parameters of its checkpoint: laid out, or as NumPy arrays."""
    folder, step = _run_and_step(reference)
    steps = checkpoint.steps_in(folder / "checkpoints")
    if not steps or (step is not None and step not in steps):
        there = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
        raise InputError("MODEL", str(reference), f"no such checkpoint, {there}", "Train the run, or name a step that it has")
    shapes = jax.eval_shape(lambda: gpt2.init(model, jax.random.key(0)))
    if place is None:
        abstract = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)
    else:
        shardings = sharding.shardings(place, shapes) if isinstance(place, jax.sharding.Mesh) else jax.tree.map(lambda _: place, shapes)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    params, _ = checkpoint.restore(folder / "checkpoints" / str(steps[-1] if step is None else step), abstract)
    return Loaded(model, params, _tokenizer_of(folder))


def _tokenizer_of(run: Place) -> Tokenizer:
    with _at_hand(run, ["tokenizer"]) as folder:
        return Tokenizer.load(folder / "tokenizer")


@contextlib.contextmanager
def _at_hand(run: Place, names: Sequence[str]) -> Iterator[Path]:
    """A directory on this machine with these files and folders of a run: its own, or for the time being one with copies."""
    if isinstance(run, Path):
        yield run
        return
    with tempfile.TemporaryDirectory() as folder:
        storage.fetch(run, names, Path(folder))
        yield Path(folder)


def _open_others(reference: str, settings: Mapping[str, Any] | None = None, tokenizer: str | Path = "") -> tuple[huggingface.Source, Tokenizer]:
    """The weights, not read yet, and the tokenizer of a model of others; arguments as for `load`."""
    path = huggingface.resolve(reference)
    source = huggingface.open_weights(path, settings=settings)
    own = path if path.is_dir() else path.parent
    tokens = tokenizers.gpt2() if tokenizer == "gpt2" else Tokenizer.load(Path(tokenizer or own))
    if tokens.vocab_size > source.config.vocab_size:
        reason = f"has {tokens.vocab_size} tokens, more than the {source.config.vocab_size} that the model embeds"
        raise InputError("tokenizer", str(tokenizer or own), reason, "Use the tokenizer that the model was trained with")
    return source, tokens


def _is_run(reference: str | Place) -> bool:
    """False where others made what is there. Raises InputError where it would be in a bucket: there are runs alone."""
    run, _ = _run_and_step(reference)
    found = (run / "run.json").exists()
    if not found and storage.is_in_bucket(run):
        raise InputError("MODEL", str(run), "no run is there", "Name a run, or a checkpoint of it, RUN/checkpoints/STEP")
    return found


def _run_and_step(reference: str | Place) -> tuple[Place, int | None]:
    """RUN@STEP and RUN/checkpoints/STEP as (RUN, STEP), RUN@best as (RUN, the step with the lowest validation loss); any other path as (path, None).

    Raises:
      InputError: no checkpoint of RUN@best tells its validation loss.
    """
    place = storage.place(reference)
    if place.parent.name == "checkpoints" and place.name.isdecimal():
        return place.parent.parent, int(place.name)
    name, _, step = place.name.rpartition("@")
    if not name or not (step.isdecimal() or step == "best") or place.exists():
        return place, None
    run = place.with_name(name)
    if step == "best":
        step = checkpoint.best_step(run / "checkpoints")
        if step is None:
            remedy = "Name a step of a run, as RUN@STEP, or train with train.save_every a multiple of train.eval_every"
            raise InputError("MODEL", str(reference), "no checkpoint there tells its validation loss", remedy)
    return run, int(step)


def import_model(
    reference: str,
    folder: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str | Path = "",
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> None:
    """Writes a model of Hugging Face, nanoGPT or minGPT as a run directory with one checkpoint, 0; `settings` and `tokenizer` as for `load`.

    Raises:
      InputError: the folder is in use, or the model cannot be read.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("OUT", str(folder), "exists and is not empty", "Name a new directory")
    if _is_run(reference):
        raise InputError("MODEL", reference, "a run directory already", "Use it as it is, or copy it")
    source, tokens = _open_others(reference, settings, tokenizer)
    params = source.params()  # NumPy arrays are written without another copy
    say(f"{reference}: {source.describe()}")
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(0, params, {"step": jnp.int32(0)})
    tokens.save(folder / "tokenizer")
    config = Config(name="imported", model=source.config)
    write_json(folder / "run.json", {"experiment": {"module": "", "structural": False, "files": []}, "imported_from": str(reference)})
    storage.write_text(folder / "config.json", to_json(config))


def export_model(reference: str, folder: Path, *, trust_code: bool = False) -> None:
    """Writes any model as a Hugging Face directory.

    Raises:
      InputError: Hugging Face GPT-2 cannot express it, or the folder is in use.
    """
    if not _is_run(reference):
        source, tokens = _open_others(reference)
        huggingface.export_weights(source.config, source.unread(), folder, tokenizer=tokens)
        return
    model = _rebuild(reference, trust_code)
    if unlike := _unlike_gpt2(model):
        remedy = "Export a model that is GPT-2 as Hugging Face has it"
        raise InputError("MODEL", reference, f"Hugging Face's GPT-2 cannot express {unlike}", remedy)
    _, params, tokenizer = _restore(reference, model, None)
    huggingface.export_weights(model.config, params, folder, tokenizer=tokenizer)


def _unlike_gpt2(model: gpt2.Model) -> str:
    """What of the model Hugging Face's GPT-2 has no place for, by name; empty where it can be exported."""
    names = [f"model.{field} = {value}" for field, value in huggingface.inexpressible(model.config).items()]
    if type(model) is not gpt2.GPT2:
        names.append(f"the structure of {type(model).__name__}")
    elif model.block is not gpt2.Block:
        names.append(f"the structure of {getattr(model.block, '__name__', model.block)}")
    return ", ".join(names)


def evaluate_reference(reference: str, *, text: str | None, trust_code: bool, int8: bool = False) -> dict[str, Any]:
    """`evaluate.measure` of any model, on the validation split of its run or on a text source; `int8` rounds its weights first.

    Raises:
      InputError: there is no such model or text, or no validation split and no text.
    """
    model, params, tokenizer = load(reference, trust_code=trust_code)
    params = quantized.int8(params) if int8 else params
    run, _ = _run_and_step(reference)
    trained = (run / "run.json").exists() and "imported_from" not in read_json(run / "run.json")
    data = read_config(run).data if trained else DataConfig()
    if text:
        texts = plain_texts(DataConfig(source=text))
        if not texts:
            raise InputError("--text", text, "holds no text", "Name a file or folder of text")
        ids = [np.concatenate([[tokenizer.eot_id], ids]).astype(np.int32) for ids in tokenizer.encode_batch(texts)]
        tokens = Tokens([np.concatenate(ids)])
        n_bytes, n_characters = sum(len(text.encode()) for text in texts), sum(map(len, texts))
    else:
        if not trained:
            raise InputError("MODEL", reference, "has no validation split", "Give a text with --text")
        folder = storage.place(data.tokens) if data.tokens else run / "tokens"
        if storage.is_in_bucket(run) and not storage.is_in_bucket(folder):
            folder = run / "tokens"  # its own copy of this split
        split, tokens = read_manifest(folder).splits["val"], open_tokens(folder, "val")
        n_bytes, n_characters = split.bytes, split.characters
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    documents = documents_of(data, tokenizer.eot_id)
    return evaluate.measure(model, params, tokens, mesh, n_bytes=n_bytes, n_characters=n_characters, documents=documents)


def on_host(params: Any) -> Any:
    """The parameters as whole NumPy arrays, also where other processes hold parts of them."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(params, tiled=True)
    return jax.tree.map(np.asarray, params)


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def read_config(run: Place) -> Config:
    """The configuration of a run.

    Raises:
      InputError: there is none, or it is not valid.
    """
    return from_json(json.dumps(read_json(run / "config.json")), where=str(run / "config.json"))


def read_json(path: Place) -> dict[str, Any]:
    """A JSON object from a file of a run.

    Raises:
      InputError: there is none.
    """
    remedy = "Restore the file, or start the run in a new directory"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(str(path), "", f"cannot be read as JSON ({e})", remedy) from e
    if not isinstance(value, dict):
        raise InputError(str(path), "", "not a JSON object", remedy)
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file that is whole or not there."""
    storage.write_text(path, json.dumps(value, indent=2) + "\n")


def git_commit() -> str | None:
    """The commit of the checkout that mlm_jax runs from, with "-dirty" where files differ; None outside a checkout."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Of Python and of the libraries that make a run what it is."""
    return {"python": platform.python_version()} | {package: version for package in PACKAGES if (version := _version(package))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
