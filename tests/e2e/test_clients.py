"""Real clients against the real server."""

import clients


def test_the_openai_client_and_the_inference_client_get_equal_answers(server):
    answers = clients.run(server.url)
    assert len(answers) == 8
