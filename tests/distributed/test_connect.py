"""Every rank uses at the start what it will need of the network, and none waits for another for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
from gloo_launcher import run_ranks

from megatron_adapters.interface import Layout

pytestmark = pytest.mark.distributed


def test_every_way_between_ranks_is_used_at_the_start(tmp_path: Path) -> None:
    layouts = [Layout(tp_size=2, pp_size=2), Layout(pp_size=4), Layout(tp_size=2, dp_size=2, ep_size=2)]
    split, stages, experts = run_ranks("connect_scenarios:connected", 4, tmp_path, layouts)
    assert split[0] == {("all_reduce", (0, 1)), ("all_reduce", (0, 2)), ("send", (2,)), ("recv", (2,))}
    assert split[3] == {("all_reduce", (2, 3)), ("all_reduce", (1, 3)), ("send", (1,)), ("recv", (1,))}
    everybody = ("all_reduce", (0, 1, 2, 3))
    assert stages[0] == {everybody, ("send", (1,)), ("recv", (1,))}
    assert stages[1] == {everybody, ("recv", (0,)), ("send", (2,)), ("recv", (2,)), ("send", (0,))}
    assert experts[1] == {
        ("all_reduce", (0, 1)),  # TP, and the experts'
        ("all_to_all_single", (0, 1)),
        ("all_reduce", (1, 3)),  # DP, and the experts' copies
    }
