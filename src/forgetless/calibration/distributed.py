"""The sum of second moments over processes, each of which has seen some of the batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from forgetless.linalg.moments import SecondMoment
from forgetless.models.placement import computes_on
from forgetless.models.targets import Target
from forgetless.processes import Processes


def add_up_(
    moments: dict[str, SecondMoment],
    site_of: dict[str, str],
    targets: Mapping[str, Target],
    processes: Processes,
) -> None:
    """Put the sums and counts over all processes in place of each one's own, at every site.

    A process that has seen no batch begins with zeros. Each site's sums travel once.

    Args:
        moments: Of the batches that this process has seen, by site.
        site_of: Target name to site, as far as they were called here.
        targets: The layers by name; a site bears the name of one.
        processes: All of them, and which one this is.
    """
    facts = {site: (m.width, m.lower_DD.dtype) for site, m in moments.items()}
    seen = processes.each((site_of, facts))
    for sites, shapes in seen:
        for target, site in sites.items():
            site_of.setdefault(target, site)
        for site, (width, dtype) in shapes.items():
            if site not in moments:
                device = computes_on(targets[site].module)
                moments[site] = SecondMoment.zeros(width, dtype=dtype, device=device)
    order = dict.fromkeys(site for _, shapes in seen for site in shapes)
    counts = torch.tensor([[moments[s].num_tokens, moments[s].num_samples] for s in order])
    processes.add_up_(counts)
    for site, (num_tokens, num_samples) in zip(order, counts.tolist(), strict=True):
        moment = moments[site]
        processes.add_up_(moment.lower_DD)
        processes.add_up_(moment.sum_D)
        moment.num_tokens, moment.num_samples = num_tokens, num_samples
