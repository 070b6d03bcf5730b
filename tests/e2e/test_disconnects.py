"""Clients that leave take nothing with them."""

import disconnects


def test_no_block_is_held_after_500_clients_left_at_random_moments(server):
    seen = disconnects.run(server, 500)
    print(seen)
    assert seen["finished"] + seen["left"] == 500
    assert seen["left"] >= 250
    assert seen["finished"] >= 50
    assert seen["held"] == 0
    assert seen["free"] == seen["baseline"]
    assert server.process.poll() is None
