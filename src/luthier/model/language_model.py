"""A language model with its sites, its attachments and its executor.

Idea: the zoo's module stays the truth. This object holds it, knows its sites and head, keeps track of what is attached,
and runs forests through it. Whether the fast executor computes what the zoo's own forward computes is not assumed but
probed once with a few tokens; where it does not (recurrent layers, attention we cannot drive), unrolled paths are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import final

import torch

from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean
from luthier.data.forest import Forest, Ints, Tree
from luthier.kernels.chosen import backend_for
from luthier.kernels.head import Head
from luthier.kernels.lanes import Lane
from luthier.model.attending.attention import Root
from luthier.model.editing import attachment as surgery
from luthier.model.editing import merging
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import Edit, EditedModule, LearnedRoot
from luthier.model.editing.merging import Merged, Rounding
from luthier.model.editing.mixes import checked_mix, root_of
from luthier.model.editing.sites import Sites, find_sites
from luthier.model.editing.thin_terms import TermKeeper
from luthier.model.editing.token_rows import ADD_ROWS
from luthier.model.editing.value_head import ValueHead, value_head_of
from luthier.model.routes import Parts, Routes, parts_of, routes_over
from luthier.model.running.executor import Executor, run_segments, seen_root
from luthier.model.running.guests import Guest, require_guests, sole
from luthier.model.running.head import edited_head, head_of
from luthier.model.running.known import known_executor
from luthier.model.running.outputs import TokenOutputs
from luthier.model.running.parts import Loss, Part, backward_in_parts
from luthier.model.running.scoring import AnyHead
from luthier.model.running.task_executor import probe_task, run_task, task_head_of
from luthier.model.running.unrolled import run_unrolled
from luthier.model.running.zoo_head import head_modules, new_parts, tempered
from luthier.model.tasks import CAUSAL, Task
from luthier.model.zoo import ZooConfig, ZooModule


@final
class LanguageModel:
    """A model of the zoo, frozen until something is attached.

    `source` says where it came from, `digest` identifies its weights, `notices` lists what a user should know
    (precision chosen, executor fallback). `kernels` is one of the choices of `kernels/chosen.py`. `task` is what the
    model was loaded for, `fresh` names the parameters that no file held: those of a new head. With `known_as`, a digest
    of the weights, it is probed once and not at every start.
    """

    def __init__(
        self,
        module: ZooModule,
        *,
        source: str,
        digest: str,
        notices: tuple[str, ...] = (),
        kernels: str = "auto",
        task: Task = CAUSAL,
        fresh: tuple[str, ...] = (),
        known_as: str = "",
    ) -> None:
        self.module = module
        self.task = task
        self.fresh = fresh
        self.source = source
        self.digest = digest
        self.notices = list(notices)
        self.attachments: dict[str, Attachment] = {}
        self.mixes: dict[str, Parts] = {}
        self.merged: list[Merged] = []
        module.requires_grad_(False)
        module.eval()
        self.sites: Sites = find_sites(module, apart=head_modules(module, task, fresh))
        backend, missing = backend_for(kernels, module.device, module.dtype)
        if task == CAUSAL:
            self.executor: Executor = known_executor(module, backend, fused=kernels != "torch", digest=known_as)
        else:
            self.executor = probe_task(module, task, backend, fused=kernels != "torch")
        if missing and self.executor.blocks is not None:
            self.notices.append(f"kernels: plain torch ({missing})")
        if self.executor.reason:
            self.notices.append(f"forest executor: {self.executor.kind} ({self.executor.reason})")
        self._terms = TermKeeper(backend, module.dtype)

    @property
    def config(self) -> ZooConfig:
        return self.module.config

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def kernels(self) -> str:
        """What computes it: the zoo's own blocks or ours, and by which backend."""
        ours = "our blocks" if self.executor.blocks is not None else "the zoo's blocks"
        masked = "" if self.executor.by_mask is None else ", attention by mask"
        return f"{ours}, {self.executor.backend.identity}{masked}"

    @property
    def vocabulary_size(self) -> int:
        return int(self.module.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, index]

    @property
    def context_tokens(self) -> int | None:
        """The longest sequence the config allows for, when it says so."""
        limit = getattr(self.module.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    def require_rows(self, tokens: Ints) -> None:
        """Raise RecipeError for a token that has no row here; the lookup would end in an index error."""
        size, largest, least = self.vocabulary_size, int(tokens.max(initial=0)), int(tokens.min(initial=0))
        if largest >= size or least < 0:
            raise RecipeError(
                f"token {least if least < 0 else largest} has no row: {self.source} has {size:,}",
                allowed=f"tokens 0 to {size - 1}",
                do=f"use the tokenizer and template this model was trained with. {ADD_ROWS}",
            )

    def token_outputs(self, forest: Forest, *, temperature: float = 1.0) -> TokenOutputs:
        """What comes out for all tokens with weight, differentiable in whatever is trained.

        Log-probabilities are those of the policy at `temperature`.
        """
        guests = self._guests(forest.trees, temperature)
        root = None if guests else self.active_root
        head = tempered(self.head, temperature)
        if self.task != CAUSAL:
            if guests:
                raise RecipeError(
                    f"several adapters in one batch of a model that was loaded for {self.task.name}",
                    allowed="models that go on with a text",
                )
            return run_task(self.module, forest, task=self.task, executor=self.executor, head=head, root=root)
        ways, values = self.executor, None if guests else self.active_values
        if ways.kind == "segments":
            return run_segments(self.module, forest, head=head, root=root, blocks=ways.blocks, by_mask=ways.by_mask,
                                guests=guests, values=values)  # fmt: skip
        return run_unrolled(self.module, forest, head=head, root=root, guests=guests, values=values)

    def backward_in_parts(
        self, tree: Tree, loss: Loss, *, max_tokens: int, temperature: float = 1.0
    ) -> Iterator[Part]:
        """Forward and backward of one tree, its root once and its branches in parts; the same gradient as at once."""
        guest = self._guests((tree,), temperature).get(tree.adapter)
        if tree.adapter in self.mixes:
            raise RecipeError(f"a tree of the mix {tree.adapter!r}, in parts", allowed="trees of single adapters")
        return backward_in_parts(
            self.module,
            tree,
            loss,
            head=tempered(self.head, temperature) if guest is None else guest.head,
            max_tokens=max_tokens,
            root=self.active_root if guest is None else guest.root,
            blocks=self.executor.blocks,
            by_mask=self.executor.by_mask,
            values=self.active_values if guest is None else guest.values,
        )

    @property
    def splits_trees(self) -> bool:
        """Whether a tree can be run in parts, its root once: by segment, where a root is read from left to right."""
        return self.executor.kind == "segments" and self.task == CAUSAL

    @property
    def head(self) -> AnyHead:
        """The output head as it is now, edits and training included; None when only the zoo can compute logits."""
        return self._head(None)

    def _head(self, only: Parts | None) -> AnyHead:
        if not self.executor.own_head:
            return None
        if not self.task.speaks:
            return task_head_of(self.module, self.task, self.executor.backend)
        head = edited_head(self.module, only) or head_of(self.module)
        return replace(head, backend=self.executor.backend) if isinstance(head, Head) else head

    def _guests(self, trees: Sequence[Tree], temperature: float) -> dict[str, Guest]:
        """The adapters that trees name. Raises RecipeError for those that cannot compute in one batch."""
        names = tuple(dict.fromkeys(tree.adapter for tree in trees if tree.adapter))
        if not names:
            return {}
        self._require(names)
        heads = {name: tempered(self.head_with(name), temperature) for name in names}
        values = {name: value_head_of(own.edits) for name, own in self.attachments.items()}
        return {
            name: Guest(self.root_with(name), head, parts_of(name, self.mixes), values.get(name))
            for name, head in heads.items()
        }

    def _require(self, names: Iterable[str]) -> None:
        """Raise RecipeError unless these can compute in one batch."""
        require_guests(names, self.attachments, self.mixes)
        if self.executor.own_head:
            return
        if any(edited_head(self.module, only) for only in (None, *(parts_of(name, self.mixes) for name in names))):
            raise RecipeError(
                "an adapter changes the output head, which the model zoo computes here",
                allowed="adapters that leave the head as it is, in a batch of several",
            )

    @property
    def recomputable(self) -> int:
        """How many blocks could be recomputed in the backward pass: all where our operations run them, else none."""
        return 0 if self.executor.blocks is None else self.sites.layers

    def recompute(self, count: int, *, lane: Lane | None = None) -> None:
        """From now on keep only the inputs of the first `count` blocks, at the end of a `lane` where there is one; no
        result is changed by a single bit."""
        blocks = self.executor.blocks
        if not 0 <= count <= self.recomputable:
            raise RecipeError(f"{count} blocks cannot be recomputed", allowed=f"0 to {self.recomputable} here")
        if blocks is not None:
            self.executor = replace(self.executor, blocks=replace(blocks, recomputed=count, lane=lane))

    @property
    def active_root(self) -> LearnedRoot | None:
        """The learned root that is switched on, if any."""
        return sole([a.root for a in self.attachments.values() if a.active.always], "learned root")

    @property
    def active_values(self) -> ValueHead | None:
        """The value head that is switched on, if any."""
        return sole([value_head_of(a.edits) for a in self.attachments.values() if a.active.always], "value head")

    def seen_root(self, places: int = 0) -> Root | None:
        """The learned root that is switched on as attention sees it, if any, in texts of so many `places`."""
        return seen_root(self.module, self.active_root, self.executor.blocks, places=places)

    def seen_root_of(self, name: str, places: int = 0) -> Root | None:
        """The same of rows of a name, if they have a learned root; the base, "", has none."""
        root = self.root_with(name)
        return seen_root(self.module, root, self.executor.blocks, adapter=name, mixes=self.mixes, places=places)

    def root_with(self, name: str) -> LearnedRoot | None:
        """The learned root of an attachment, or of a part of a mix; the base, "", has none."""
        self._require((name,))
        return root_of(parts_of(name, self.mixes), self.attachments)

    def keeps_rows_apart(self, name: str | None) -> bool:
        """Whether a row under an attachment or mix of that name, under none with "", or under what is switched on with
        None, is the same to the bit in every pass without gradients of no more rows than the backend's `few`."""
        on = [own.name for own in self.attachments.values() if own.active.always]
        parts = on if name is None else [part for part, _ in parts_of(name, self.mixes)]
        sites = [self._terms.sites_of(part, self.attachments[part]) for part in parts]
        if any(own is None for own in sites) or (name is None and len(on) > 1):
            # Other edits are torch's; of several that are switched on nothing is laid out for few rows.
            return False
        head = self.head if name is None else self.head_with(name)
        named = name is not None
        return self.executor.keeps_rows_apart(head, [site for own in sites for site in own or ()], named=named)

    @property
    def head_is_edited(self) -> bool:
        """Whether an adapter on the model changes the output head, for whichever rows."""
        return isinstance(self.module.get_output_embeddings(), EditedModule)

    def head_with(self, name: str) -> AnyHead:
        """The output head under an attachment or a mix; under none with the name ""."""
        return self._head(parts_of(name, self.mixes))

    def attach(self, edits: list[Edit], *, name: str = "default", named_only: bool = False) -> Attachment:
        """Put the edits of an adapter on, under `name`; a `named_only` one computes rows that name it and no others."""
        if name in self.attachments or name in self.mixes or "." in name or not name:
            raise RecipeError(f"{name!r} cannot name an attachment", allowed="an unused name without dots")
        edits = [*edits, *new_parts(edits, self.sites, self.task, self.fresh)]
        attachment = Attachment(name, edits, named_only=named_only)
        surgery.require_apart(attachment, self.attachments.values(), self.module)
        surgery.put_on(self.module, attachment)
        self.attachments[name] = attachment
        for edit in edits:
            edit.train(self.module.training)
        return attachment

    def detach(self, name: str = "default") -> Attachment:
        """Take an attachment off; the base model is then what it was before, bit for bit."""
        attachment = self._unmixed(name)
        if not attachment.enabled:
            surgery.switch(self.module, attachment, on=True)
        surgery.take_off(self.module, attachment)
        del self.attachments[name]
        self._terms.forget([name])
        return attachment

    def merge(self, name: str = "default", *, reversible: bool = True) -> Rounding:
        """Fold an attachment into the base weights, in float32, rounded once; what rounding cost is also a notice.

        A packed weight is packed again (`packing.unpack_weights` before attaching avoids it). Where it shall be
        `reversible`, what stood there before is kept in memory for `unmerge`; else also what earlier merges kept is let
        go. The model is another one then: adapters of the old base are refused on it.
        """
        attachment = self._unmixed(name)
        beside = frozenset(self.attachments) - {name}
        if training := [other for other in sorted(beside) if self.attachments[other].trains_base]:
            raise RecipeError(
                f"{training[0]!r} trains the weights that {name!r} would be folded into",
                do=f"merge or detach {training[0]!r} first",
            )
        merged = merging.merge(self.module, attachment, digest=self.digest, beside=beside, keep=reversible)
        del self.attachments[name]
        self._terms.forget([name])
        self.digest = merging.merged_digest(self.digest, attachment)
        self.merged = [*self.merged, merged] if reversible else []
        if told := merged.rounding.notice(name):
            self.notices.append(told)
        return merged.rounding

    def unmerge(self, name: str = "default") -> Attachment:
        """Undo the last merge: the weights are those from before it, bit for bit, and the attachment is on again."""
        last = self.merged[-1] if self.merged else None
        if last is None or last.attachment.name != name:
            what = "nothing" if last is None else repr(last.attachment.name)
            raise RecipeError(
                f"{name!r} cannot be taken out of the weights: what was merged last, and can be undone, is {what}",
                do="undo merges in the reverse order",
            )
        if changed := sorted(self.attachments.keys() ^ last.beside):
            raise RecipeError(
                f"{', '.join(changed)} came or went after {name!r} was merged",
                do="let the same adapters be on the model as then",
            )
        merging.unmerge(self.module, last)
        self.merged.pop()
        self.digest = last.digest
        self.attachments = {name: last.attachment, **self.attachments}
        return last.attachment

    def switch(self, name: str, *, on: bool) -> None:
        """Switch one attachment on or off."""
        attachment = self._attachment(name)
        if attachment.enabled != on:
            surgery.switch(self.module, attachment, on=on)

    def mix(self, name: str, parts: Sequence[tuple[str, float]]) -> None:
        """Let `name` stand for attachments with weights wherever rows name an adapter; without any, for the base."""
        self.mixes[name] = checked_mix(name, parts, self.attachments, self.mixes)

    def unmix(self, name: str) -> None:
        """Undo `mix`."""
        if name not in self.mixes:
            raise RecipeError(f"no mix is called {name!r}", do=did_you_mean(name, self.mixes))
        del self.mixes[name]

    def routes(self, rows: Iterable[tuple[str, int]]) -> Routes:
        """Names of attachments or mixes, or "" for the base alone, and how many rows each has, one after another.

        Without gradients the low-rank terms of all of them are added at once, however many there are.
        """
        routes = routes_over(rows, dict(self.mixes))
        self._require(routes.names)
        if torch.is_grad_enabled():
            return routes
        return replace(routes, thin=self._terms.over(routes, self.attachments))

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        """The model with one attachment and no other, for the length of a `with` block."""
        own = self._attachment(name)
        with surgery.switched_off(self.module, [each for each in self.attachments.values() if each is not own]):
            yield

    @contextmanager
    def without_attachments(self) -> Iterator[None]:
        """The base model, for the length of a `with` block."""
        with surgery.switched_off(self.module, list(self.attachments.values())):
            yield

    def train(self, mode: bool = True) -> None:
        """Dropout on or off, in the base and in every edit."""
        if mode:
            self._terms.forget()
        self.module.train(mode)
        for attachment in self.attachments.values():
            for edit in attachment.edits:
                edit.train(mode)

    def _unmixed(self, name: str) -> Attachment:
        attachment = self._attachment(name)
        if mixed := [mix for mix, parts in self.mixes.items() if name in dict(parts)]:
            raise RecipeError(f"{name!r} is a part of the mix {mixed[0]!r}", do=f"undo {mixed[0]!r} first")
        return attachment

    def _attachment(self, name: str) -> Attachment:
        if name not in self.attachments:
            raise RecipeError(f"no attachment is called {name!r}", do=did_you_mean(name, self.attachments))
        return self.attachments[name]
