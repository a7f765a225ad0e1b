"""Every setting of the server: its name, form, default and meaning."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petalfl.codecs import CODECS, parse_codec
from petalfl.errors import PetalError
from petalfl.model import OPTIMIZERS
from petalfl.training import MAX_EPOCHS
from petalfl.wire import MAX_COUNT

from .aggregators import parse_aggregator
from .choices import form_of
from .optimizers import parse_optimizer
from .reducer import FORMS, parse_reducer
from .selection import SELECTIONS, parse_selection
from .weighting import WEIGHTINGS, parse_weighting

FILE_NAME = "server.toml"


class ConfigError(PetalError):
    """A setting that cannot be used; the message names it."""


@dataclass(frozen=True, slots=True)
class PerBlock:
    """A number for every block, and others for some of them."""

    default: int
    by_block: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __call__(self, block: str) -> int:
        """The number of this block."""
        return self.by_block.get(block, self.default)

    def __str__(self) -> str:
        return ",".join([str(self.default), *(f"{b}={n}" for b, n in self.by_block.items())])


@dataclass(frozen=True, slots=True)
class Option:
    """One setting.

    Attributes:
        read: A text, or a value of TOML, to the setting's value; raises ValueError.
        is_of_server: Of the whole process; else each federation may have its own.
        is_reloadable: A running server takes a new value over between two rounds.
    """

    name: str
    read: Callable[[Any], Any]
    default: Any
    help: str
    group: str = ""
    metavar: str = ""
    is_of_server: bool = False
    is_reloadable: bool = False

    @property
    def key(self) -> str:
        """Its name in files, in the environment, and among parsed arguments."""
        return self.name.replace("-", "_")


# Forms


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, found {value!r}")
    return value


def _path(value: Any) -> Path:
    return Path(_text(value))


def _whole(value: Any) -> int:
    if type(value) is int:
        return value
    try:
        return int(_text(value))
    except ValueError:
        raise ValueError(f"expected a whole number, found {value!r}") from None


def _at_least(low: int, high: int = MAX_COUNT) -> Callable[[Any], int]:
    """As far as devices are told of it, they take no more than `MAX_COUNT`."""

    def read(value: Any) -> int:
        number = _whole(value)
        if number < low:
            raise ValueError(f"found {number}, expected at least {low}")
        if number > high:
            raise ValueError(f"found {number}, expected at most {high}")
        return number

    return read


def _number(value: Any) -> float:
    if type(value) in (int, float):
        return float(value)
    try:
        return float(_text(value))
    except ValueError:
        raise ValueError(f"expected a number, found {value!r}") from None


def _above(low: float, expected: str, high: float = sys.float_info.max) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        number = _number(value)
        if not low < number <= high:
            raise ValueError(f"found {number:g}, expected {expected}")
        return number

    return read


def _from(low: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        number = _number(value)
        if not low <= number < math.inf:
            raise ValueError(f"found {number:g}, expected at least {low:g}")
        return number

    return read


def _switch(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if type(value) is bool:
        return value
    if str(value).lower() not in known:
        raise ValueError(f"expected true or false, found {value!r}")
    return known[str(value).lower()]


def _one_of(*choices: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(
                f"expected one of {', '.join(c for c in choices if c)}, found {value!r}"
            )
        return str(value)

    return read


def _names(value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected names, found {value!r}")
    return tuple(name.strip() for name in names if name.strip())


def _per_block(low: int) -> Callable[[Any], PerBlock]:
    """A number, ``N,BLOCK=N``, or a table of blocks with ``default``."""
    number = _at_least(low)

    def read(value: Any) -> PerBlock:
        if isinstance(value, str):
            first, *rest = value.split(",")
            pairs = [part.partition("=") for part in rest]
            return PerBlock(number(first), {name.strip(): number(n) for name, _, n in pairs})
        if isinstance(value, dict):
            rest_of = {name: number(n) for name, n in value.items() if name != "default"}
            return PerBlock(number(value.get("default", low)), rest_of)
        return PerBlock(number(value))

    return read


def _rule(parse: Callable[[str], object]) -> Callable[[Any], str]:
    """The text itself, once its parser has taken it."""

    def read(value: Any) -> str:
        parse(_text(value))
        return str(value)

    return read


def _forms(rules: Mapping[str, Callable[..., object]]) -> str:
    return ", ".join(form_of(name, rule) for name, rule in rules.items())


# The table

TLS, ROUNDS = "TLS", "rounds"
RULES, TRAINING = "what the server makes of updates", "local training"

OPTIONS: tuple[Option, ...] = (
    Option("artifacts", _path, None, "made by python -m export", metavar="DIR"),
    Option("data-dir", _path, Path("petalfl-data"),
           "devices, journal and block versions; kept over restarts", metavar="DIR"),
    Option("http", _text, "127.0.0.1:8080", "port 0: any free one", metavar="HOST:PORT",
           is_of_server=True),
    Option("broker", _text, "embedded",
           "embedded, embedded:PORT, or mqtt(s)://user:password@host:port of a Mosquitto with "
           "its dynamic-security plugin", metavar="SPEC", is_of_server=True),
    Option("tls-cert", _path, None,
           "serve HTTPS, and MQTT with TLS on an embedded broker, with this certificate and its "
           "chain (PEM): docs/tls.md", TLS, "FILE", is_of_server=True),
    Option("tls-key", _path, None, "its private key, where it is not in the same file", TLS,
           "FILE", is_of_server=True),
    Option("tls-client-ca", _path, None,
           "mutual TLS: let only clients in that have a certificate of these authorities", TLS,
           "FILE", is_of_server=True),
    Option("broker-ca", _path, None,
           "authorities to trust at a broker mqtts://…, instead of the system's", TLS, "FILE",
           is_of_server=True),
    Option("broker-cert", _path, None, "certificate for a broker that asks for one", TLS, "FILE",
           is_of_server=True),
    Option("broker-key", _path, None, "its private key, where it is not in the same file", TLS,
           "FILE", is_of_server=True),
    Option("federation", _text, "default", "a-z, 0-9 and '-'", metavar="NAME", is_of_server=True),
    Option("token", _text, "", "join token; the default is random and kept in --data-dir"),
    Option("reducer", _rule(parse_reducer), "auto",
           f"what sums the updates up: {', '.join(FORMS)}; auto takes the fastest that is here: "
           "docs/reducer.md", metavar="NAME", is_of_server=True),
    Option("log-level", _one_of("debug", "info", "warning", "error"), "info",
           "of the log on stderr: debug, info, warning or error", metavar="LEVEL",
           is_of_server=True, is_reloadable=True),
    Option("scheme", _text, "",
           "what is shared: fm (full-model) all, ph (private-head) all but the heads, phf "
           "(private-head-fusion) encoders, local nothing, personal all but personal heads, which "
           "always stay; the default is the manifest's private_blocks. Frozen blocks are never "
           "sent", ROUNDS, "{fm,ph,phf,local,personal}"),
    Option("private-blocks", _names, (), "instead of a scheme: the blocks that stay on the devices",
           ROUNDS, "BLOCK,…"),
    Option("private-tensors", _names, (),
           "of the shared blocks: tensors that stay on the devices, as BLOCK/TENSOR with * and ?; "
           "batch-norm is FedBN: weight, bias and running statistics of every such layer", ROUNDS,
           "GLOB,…"),
    Option("mode", _one_of("sync", "async"), "sync",
           "sync: a cohort trains, then all blocks step; async (FedBuff, per block): every device "
           "trains at its own pace, and a block steps when its buffer is full", ROUNDS,
           "{sync,async}"),
    Option("rounds", _at_least(0), 0,
           "0: until stopped. Of mode async a round is one step of the fastest block", ROUNDS, "N",
           is_reloadable=True),
    Option("min-devices", _at_least(1), 1, "a round starts when so many devices are ready", ROUNDS,
           "N", is_reloadable=True),
    Option("deadline", _above(0, "seconds above 0"), 600.0,
           "seconds after which nobody waits for a device any longer; in mode async it is told its "
           "task again", ROUNDS, "S",
           is_reloadable=True),
    Option("selection", _rule(parse_selection), "all",
           f"who of the ready devices is asked, in mode sync: {_forms(SELECTIONS)}", ROUNDS, "RULE",
           is_reloadable=True),
    Option("cohort-size", _at_least(0), 0,
           "a round closes when so many devices have reported; 0: all that were asked", ROUNDS,
           "N", is_reloadable=True),
    Option("over-selection", _from(1), 1.0,
           "ask so many times as many devices as are waited for", ROUNDS, "FACTOR",
           is_reloadable=True),
    Option("quorum", _per_block(1), PerBlock(1),
           "a block with updates of fewer devices keeps its version; for some blocks another "
           "number: 1,head=3", ROUNDS, "N[,BLOCK=N]", is_reloadable=True),
    Option("buffer-size", _per_block(1), PerBlock(10),
           "of mode async: the updates that make up a block's next version, several of one device "
           "among them; with few devices --quorum says of how many", ROUNDS,
           "N[,BLOCK=N]", is_reloadable=True),
    Option("max-staleness", _at_least(0), 20,
           "of mode async: an update may have started so many versions ago; after s versions it "
           "weighs 1/√(1+s)", ROUNDS, "N", is_reloadable=True),
    Option("keep-versions", _at_least(1), 20,
           "of each block, so many of the newest; in mode async at least those that updates may "
           "have started from", ROUNDS, "N", is_reloadable=True),
    Option("max-upload-bytes", _at_least(0), 0,
           "a device sends the blocks that this has room for, by impact, size and age; 0: all",
           ROUNDS, "N", is_reloadable=True),
    Option("codec", _rule(parse_codec), "f32",
           f"of updates on their way up: {', '.join(CODECS)}, where SHARE of the values is sent "
           "now, the rest later. A device that does not know it uses the next longer one",
           ROUNDS, "NAME", is_reloadable=True),
    Option("aggregator", _rule(parse_aggregator), "weighted-mean",
           "weighted-mean, median, trimmed-mean:SHARE, krum:ATTACKERS, canonical and more: "
           "docs/strategies.md", RULES, "RULE", is_reloadable=True),
    Option("server-optimizer", _rule(parse_optimizer), "sgd",
           "sgd, momentum:BETA, adam, yogi, adagrad, orthogonal: docs/strategies.md; of a model "
           "with a personal head, and in mode sync, the default is momentum:0.5", RULES, "RULE",
           is_reloadable=True),
    Option("server-momentum", _from(0), 0.0, "short for --server-optimizer momentum:BETA", RULES,
           "BETA", is_reloadable=True),
    Option("weighting", _rule(parse_weighting), "examples",
           f"how much an update counts: {_forms(WEIGHTINGS)}", RULES, "RULE", is_reloadable=True),
    Option("max-update-norm", _from(0), 0.0,
           "scale longer updates of a block down to this norm; 0: never", RULES, "NORM",
           is_reloadable=True),
    Option("deterministic", _switch, False,
           "the same updates make the same bits, in whatever order they arrive; keeps all of a "
           "round's until it closes", RULES, is_reloadable=True),
    Option("optimizer", _one_of(*OPTIMIZERS), "sgd",
           "of the devices, sgd or adamw, with a state that is fresh each round", TRAINING, "NAME",
           is_reloadable=True),
    Option("learning-rate", _number, 0.05, "adamw wants about 0.001", TRAINING, "LR",
           is_reloadable=True),
    Option("schedule", _one_of("", "constant", "cosine"), "",
           "of the learning rate across rounds; the default is cosine with --rounds", TRAINING,
           "{constant,cosine}", is_reloadable=True),
    Option("momentum", _number, 0.9, "of sgd", TRAINING, is_reloadable=True),
    Option("nesterov", _switch, False, "look ahead along the momentum of sgd", TRAINING,
           is_reloadable=True),
    Option("beta1", _number, 0.9, "of adamw", TRAINING, is_reloadable=True),
    Option("beta2", _number, 0.999, "of adamw", TRAINING, is_reloadable=True),
    Option("epsilon", _number, 1e-8, "of adamw", TRAINING, "EPS", is_reloadable=True),
    Option("weight-decay", _number, 1e-5, "of sgd (L2) or adamw (decoupled)", TRAINING,
           is_reloadable=True),
    Option("max-grad-norm", _number, 0.0,
           "clip the gradient of all of a device's blocks together to this norm; 0: never",
           TRAINING, "NORM", is_reloadable=True),
    Option("proximal-mu", _number, 0.0,
           "FedProx: pull shared blocks towards the start of the round; 0: off", TRAINING, "MU",
           is_reloadable=True),
    Option("method", _one_of("fedsim", "fedalt"), "fedsim",
           "fedsim: private and shared blocks train together; fedalt: first the private ones, then "
           "the shared ones, each for as many epochs", TRAINING, "{fedsim,fedalt}",
           is_reloadable=True),
    Option("scaffold", _switch, False,
           "SCAFFOLD: control variates correct the drift of devices whose data differ, for twice "
           "the bytes; of mode sync. With --momentum 0 it is the paper's", TRAINING),
    Option("batch-size", _whole, 16, "examples per step", TRAINING, "N", is_reloadable=True),
    Option("accumulation", _whole, 1,
           "compute each batch in N parts, one after another, to save memory", TRAINING, "N",
           is_reloadable=True),
    Option("epochs", _whole, 1, "per round", TRAINING, "N", is_reloadable=True),
    Option("max-steps", _whole, 0,
           "end a round after so many batches, if the epochs have as many; 0: no limit", TRAINING,
           "N", is_reloadable=True),
    Option("finish-epochs", _at_least(0, MAX_EPOCHS), 0,
           "after the last round every device fine-tunes all its blocks alone, for so many epochs: "
           "its own model, which does not leave it; 0: none; of a model with a personal head the "
           "default is 30", TRAINING, "N", is_reloadable=True),
    Option("finish-rate", _above(0, "a share above 0, of 1 at most", 1.0), 0.1,
           "of that, as a share of --learning-rate", TRAINING, "SHARE", is_reloadable=True),
    Option("seed", _at_least(0), 0, "of cohorts, shuffling and dropout", TRAINING, "N"),
)  # fmt: skip
BY_KEY = {option.key: option for option in OPTIONS}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every option; those not given leave no trace among the parsed arguments."""
    groups: dict[str, Any] = {"": parser}
    about = f"settings as TOML; the default is {FILE_NAME}, if there is one"
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=about)
    for option in OPTIONS:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        shown = "" if option.default in (None, "", ()) else f" (default: {option.default})"
        kind: dict[str, Any] = {"metavar": option.metavar or option.key.upper()}
        if option.read is _switch:
            kind = {"action": "store_const", "const": "true"}
        groups[option.group].add_argument(
            f"--{option.name}", default=argparse.SUPPRESS,
            help=(option.help + shown).replace("%", "%%"), **kind,
        )  # fmt: skip
