"""Where else in the cluster the page is: what somebody needs whose own node is gone."""

import time
from urllib.parse import urlsplit

from cordee.agent.agent import Agent


def other_pages(agent: Agent) -> list[dict[str, str]]:
    """`name` and `url` of the page of each other node that has one for other machines."""
    nodes = agent.controller.nodes(time.monotonic())
    return [
        {"name": facts.name, "url": facts.page}
        for node, (state, facts) in nodes.items()
        if node != agent.node and state == "alive" and urlsplit(facts.page).scheme in ("http", "https")
    ]
