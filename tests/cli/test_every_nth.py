"""`--every-nth` of a command."""

CLIP = "samples/square.mp4"


def test_ask_looks_at_every_nth_frame(cli):
    plans = [cli("inspect", CLIP, *rate, "-m", "demo", "--json").record["plan"] for rate in (("--every-nth", "4"), ())]
    assert len(plans[0]["timestamps_s"]) != len(plans[1]["timestamps_s"])
    asked = cli("ask", CLIP, "What happens?", "--every-nth", "4", "-n", "1", "--json").record
    assert asked["error"] is None and asked["sampling"]["frames"] == len(plans[0]["timestamps_s"])
    refused = cli("ask", CLIP, "What happens?", "--every-nth", "4", "--fps", "2")
    assert refused.code == 2 and "every_nth excludes fps and frames" in refused.err and "give one" in refused.err
