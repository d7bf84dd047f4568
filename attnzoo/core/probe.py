"""Probes: what is measured of a trained model."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from attnzoo.core.instrument import Instrument


@dataclass(kw_only=True, eq=False)
class Probe(Instrument):
    """Measures something of a model: a dataclass with a `card`, whose fields are its options.

    @dataclass(kw_only=True, eq=False)
    class Entropy(Probe):
        \"\"\"Mean entropy of each head.

        Args:
            unit: `nats`, or `share` of the most there can be.
        \"\"\"

        card = InstrumentCard("entropy", "How spread out each head attends.", needs={"weights"})
        unit: Literal["nats", "share"] = "nats"

        def measure(self, subject):
            ...
            return Finding(columns={"layer": [...], "head": [...], "entropy": [...]}, shows="entropy")
    """

    @abstractmethod
    def measure(self, subject: Any) -> Any:
        """What is found, an `attnzoo.lab.Finding`.

        Args:
            subject: An `attnzoo.lab.Subject`: the model, its data, and ways to look at both. It is left as it was.
        """

    def draw(self, finding: Any, figure: Any) -> None:
        """Draw what was found: layers × heads in colours. Override it where another picture says more.

        Args:
            finding: What `measure` gave.
            figure: An empty matplotlib `Figure`.
        """
        finding.draw(figure)
