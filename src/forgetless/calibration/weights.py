"""How much each source of a role counts, where there are several: by its tokens, or all alike."""

from __future__ import annotations

from collections.abc import Sequence

from forgetless.calibration.engine import SiteMoments
from forgetless.data.spec import SourceWeights


def weights_that_count(sources: Sequence[object], weights: SourceWeights) -> SourceWeights:
    """`tokens` where there are not several sources: the mean of one is its own."""
    return weights if len(sources) > 1 else "tokens"


class WeighedSources:
    """Sums moments of sources, one after the other, so that no two need to be kept at a time.

    With `tokens` every token counts once. With `equal` E[x xᵀ] and E[x] are the plain means of the
    sources' own, site by site; a source without a token at a site does not count there.
    """

    def __init__(self, weights: SourceWeights) -> None:
        """Begin with no source."""
        self._weights = weights
        self._total: SiteMoments | None = None
        self._sources: dict[str, int] = {}

    def add(self, part: SiteMoments) -> None:
        """Add a source; its sums are used up."""
        for site, moment in part.moments.items():
            self._sources[site] = self._sources.get(site, 0) + (moment.num_tokens > 0)
            if self._weights == "equal" and moment.num_tokens:
                moment.weigh_(1 / moment.num_tokens)
        if self._total is None:
            self._total = part
            return
        for site, moment in part.moments.items():
            self._total.moments[site].merge_(moment)

    def total(self) -> SiteMoments:
        """The sum over the sources, of which there is one at least; counts are those of all."""
        assert self._total is not None, "a role has a source"
        if self._weights == "equal":
            for site, moment in self._total.moments.items():
                moment.weigh_(moment.num_tokens / max(self._sources[site], 1))
        return self._total
