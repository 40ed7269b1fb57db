"""`nightschool data forget`: what is deleted, who knew it, and who is trained anew."""

import json

from nightschool.cli.main import main
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.store.atomic import write_json
from nightschool.store.home import Home
from nightschool.store.job_queue import JobQueue
from tests.support.cli_home import add_version, make_run


def test_a_deleted_conversation_is_trained_out_of_the_version_that_knew_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NIGHTSCHOOL_HOME", raising=False)
    home = Home.find().ensure()
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok", "weight": 1}]
    ConversationStore(home.database).record("r1", "bot", "20261126_120000", said[:1], "ok")
    run = make_run(home)
    write_json(run.cycle_path, {"root": "/data"})
    version = add_version(home, run_id=run.id)
    learned = {"id": "r1", "source": "conversations", "messages": said}
    AcceptedExamples(home.database).add("bot", version.id, [learned])
    home.database.close()

    assert main(["data", "forget", "r1", "--retrain", "--yes", "--json"]) == 0

    answer = json.loads(capsys.readouterr().out)
    [job] = JobQueue(home.database).ls()
    assert (answer["forgotten"], answer["tainted"], answer["retrainings"]) == ("r1", [version.ref], {"bot": job.id})
    assert (job.state, job.recipe["start"], job.root) == ("queued", "base", "/data")
    home.database.close()
    assert main(["data", "forget", "r1", "--retrain", "--yes"]) == 4
