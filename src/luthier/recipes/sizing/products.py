"""The products that a token passes on its way through a model, read off its sites and off what is trained.

A token of the only stack, or of an encoder, passes all blocks and, if it is predicted, the head; a token of an answer
passes the decoder, which makes keys and values of what the encoder has found out about the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch import nn

from luthier.arithmetic.compute import Attention, Linear
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import LearnedKeysValues, LearnedPrompt, SiteEdit, TrainedParameters
from luthier.model.editing.sites import Site
from luthier.model.language_model import LanguageModel
from luthier.model.running.encoder_decoder import READERS

_ORDER = ({"q", "k", "v"}, {"o"}, {"gate", "up", "linear"}, {"down"})
"""The linear layers of a block in the order in which a token passes them; those of one group see the same input."""
Touched = Mapping[str, int | None]
"""Where something is trained, by name: the rank of a low-rank term, 0 for another edit, None for the weights."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Tokens on one way through a model: their part of all tokens, and how many positions each attends to.

    `reads` is how many states of an encoder each sees besides.
    """

    share: float = 1.0
    context: float = 0.0
    reads: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Where tokens go: through the only stack or an encoder, through a decoder above that, and to the head.

    `predicted` is the part of all tokens for which the head is asked. A learned prompt makes more of the texts.
    """

    texts: Stream
    answers: Stream = Stream(share=0.0)
    predicted: float = 1.0


@dataclass
class Passed:
    """The products that a token has passed, and whether what comes next needs a gradient of its input (`flowing`)."""

    touched: Touched
    flowing: bool
    linears: list[Linear] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)

    def products(self, sites: Sequence[Site], share: float) -> None:
        """Linear layers that see the same input."""
        self.linears += [_linear(site, self.touched, below=self.flowing, share=share) for site in sites]
        self.note(sites)

    def attention(self, width: int, context: float, share: float) -> None:
        if width:
            self.attentions.append(Attention(width=width, context=context, below=self.flowing, share=share))

    def note(self, sites: Sequence[Site]) -> None:
        """From here on gradients are needed if anything at these sites is trained."""
        self.flowing = self.flowing or any(_is_touched(site, self.touched) for site in sites)


def work(model: LanguageModel, attachment: Attachment, flow: Flow) -> tuple[list[Linear], list[Attention]]:
    """The products that a token passes on average, from the embedding up, and what of each needs a gradient."""
    texts, answers = stacks(model)
    touched, embed = _touched(attachment), model.sites.role("embed")
    looked_up = any(_is_touched(site, touched) for site in embed)
    # A prompt is learned below all products, keys and values beside those of a layer.
    passed = Passed(touched, looked_up or isinstance(attachment.root, LearnedPrompt))
    before, behind = _outside(model, texts)
    passed.products(before, flow.texts.share)
    keyed = isinstance(attachment.root, LearnedKeysValues)
    prefixed = attachment.root is not None
    for sites in texts:
        _pass_block(passed, model, sites, flow.texts, keyed=prefixed and not answers)
    if answers:
        known, passed.flowing = passed.flowing, looked_up
        for sites in answers:
            _pass_block(passed, model, sites, flow.answers, keyed=keyed, read=(flow.texts.share, known))
    _pass_head(passed, model, behind, flow.predicted)
    return passed.linears, passed.attentions


def recomputed_work(
    model: LanguageModel, attachment: Attachment, flow: Flow, blocks: int
) -> tuple[list[Linear], list[Attention]]:
    """The products of the first blocks, of a model with one stack."""
    passed = Passed(_touched(attachment), flowing=True)
    for sites in stacks(model)[0][:blocks]:
        _pass_block(passed, model, sites, flow.texts, keyed=False)
    return passed.linears, passed.attentions


def stacks(model: LanguageModel) -> tuple[list[list[Site]], list[list[Site]]]:
    """The sites of each block: of the only stack or an encoder, and of the decoder above it, if there is one."""
    sites = [site for site in model.sites if site.layer is not None]
    if not model.sites.two_stacks:
        return _by_layer(sites, model.sites.layers), []
    encoder = model.module.get_encoder()  # type: ignore[no-untyped-call]
    within = next(f"{name}." for name, module in model.module.named_modules() if module is encoder)
    texts = [site for site in sites if site.name.startswith(within)]
    answers = [site for site in sites if not site.name.startswith(within)]
    above = model.sites.root_layers
    return _by_layer(texts, model.sites.layers - above), _by_layer(answers, above)


def _by_layer(sites: Sequence[Site], layers: int) -> list[list[Site]]:
    """The sites of each of so many blocks; what several layers share comes once for each."""
    found = [list(own) for _, own in groupby(sorted(sites, key=_number), key=_number)]
    return [found[layer % len(found)] for layer in range(layers)] if found else []


def _number(site: Site) -> int:
    return site.layer or 0


def _pass_block(
    passed: Passed,
    model: LanguageModel,
    sites: Sequence[Site],
    stream: Stream,
    *,
    keyed: bool,
    read: tuple[float, bool] = (0.0, False),
) -> None:
    """One block; `keyed` says that keys are learned beside its own, `read` what part of all tokens an encoder has read
    and whether its states need gradients."""
    width = model.sites.heads * model.sites.head_size
    passed.note([site for site in sites if "norm" in site.roles])
    readers = [site for site in sites if set(READERS) & set(site.name.split("."))]
    for group in _groups([site for site in sites if site not in readers]):
        passed.products(group, stream.share)
        if any("v" in site.roles for site in group):
            passed.flowing = passed.flowing or keyed
            passed.attention(width, stream.context, stream.share)
        if readers and any("o" in site.roles for site in group):
            passed.products([site for site in readers if site.roles[0] == "q"], stream.share)
            own, passed.flowing = passed.flowing, read[1]
            passed.products([site for site in readers if site.roles[0] in ("k", "v")], read[0])
            passed.flowing = passed.flowing or own
            passed.attention(width, stream.reads, stream.share)
            passed.products([site for site in readers if site.roles[0] == "o"], stream.share)
    passed.note([site for site in sites if "feed" in site.roles])


def _pass_head(passed: Passed, model: LanguageModel, behind: Sequence[Site], share: float) -> None:
    """What comes after the blocks, for the tokens that are predicted; a new head is trained as a whole."""
    passed.note([site for site in model.sites if site.layer is None and "norm" in site.roles])
    for site in model.sites.role("apart"):
        trained = _is_touched(site, passed.touched)
        layers = [each for each in site.module.modules() if isinstance(each, nn.Linear)]
        for layer in layers:
            passed.linears.append(
                Linear(inputs=layer.in_features, outputs=layer.out_features, trained=trained, below=passed.flowing,
                       share=share)
            )  # fmt: skip
            passed.flowing = passed.flowing or trained
    for site in [*behind, *model.sites.role("head")]:
        passed.products([site], share)


def _outside(model: LanguageModel, blocks: Sequence[Sequence[Site]]) -> tuple[list[Site], list[Site]]:
    """The linear layers before the first block, and those behind the last one, without the head."""
    place = {site.name: index for index, site in enumerate(model.sites)}
    first = min((place[site.name] for block in blocks for site in block), default=0)
    found = [site for site in model.sites.linear() if site.layer is None]
    before = [site for site in found if place[site.name] < first]
    return before, [site for site in found if place[site.name] > first]


def _groups(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """The linear sites of a block, by what they see."""
    for roles in _ORDER:
        found = [site for site in sites if site.is_linear and "head" not in site.roles and site.roles[0] in roles]
        if found:
            yield found


def _touched(attachment: Attachment) -> Touched:
    found: dict[str, int | None] = {}
    for edit in attachment.edits:
        if isinstance(edit, TrainedParameters):
            found[edit.site_name] = None
        elif isinstance(edit, SiteEdit):
            term = edit.low_rank()
            found[edit.site_name] = 0 if term is None else len(term.down)
    return found


def _is_touched(site: Site, touched: Touched) -> bool:
    # What trains a block trains everything in it.
    return any(site.name == name or site.name.startswith(f"{name}.") for name in touched)


def _linear(site: Site, touched: Touched, *, below: bool, share: float) -> Linear:
    trained = any(
        rank is None and (site.name == name or site.name.startswith(f"{name}.")) for name, rank in touched.items()
    )
    return Linear(
        inputs=site.in_features,
        outputs=site.out_features,
        rank=touched.get(site.name) or 0,
        trained=trained,
        below=below,
        share=share,
    )
