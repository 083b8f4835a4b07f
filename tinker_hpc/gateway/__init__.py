"""Step 3 of a request: Tinker's wire protocol on 127.0.0.1, in its own process, never waiting for a GPU.

    __main__.py     the process: port, key, lease, gateway.json, uvicorn
    assembly.py     its parts put together; after a restart everything from the logs
    app.py          routes that ask for work and fetch results, thin: HTTP in, a call below, HTTP out
    rest.py         routes that need no worker, as thin; absent.py: what a cluster cannot have, one sentence each
    http.py         what every route shares
    guard.py        who may ask at all: key, Host header, body size; identity.py: tokens, and who that is
    refusals.py     answers that are not a result: a status and one clear sentence
    wire.py         protobuf and JSON <-> plain values (pure)
    models.py       a model is made, from its base or from a saved state
    training.py     requests in a model's order: passes, steps, saves, loads
    samplers.py     samplers are opened, asked and cancelled
    desk.py         what these three share: find worker and checkpoint, draw seeds, make a record, accept it
    passes.py       a pass: its loss, declared or uploaded (custom_losses.py keeps those), and its tensors (pure)
    validate.py     is a training request right? If not: what was given, what was expected, what to change (pure)
    sampling.py     the same for sampling requests (pure); prompt_asks.py: what they ask about the prompt
    checkpoints.py  tinker:// paths and the checkpoint folders behind them
    intake.py       idempotent and durable: a request id is handed out after the record is on disk
    replay.py       a loop that was started again: recorded answers, until it asks something else
    ledger.py       futures, models and samplers, built from request headers alone
    futures.py      what became of each request; wakes the long polls; completions.py: told in batches
    sessions.py     SDK sessions
    lookup.py       questions that need no worker; search.py: searching sessions (pure)
    shelf.py        saved checkpoints: delete, TTL, publish, copy, hand out files
    retention.py    when a checkpoint's files are removed; publishing.py: modes of what the group may read
    trace.py        a session's timeline

and step 7, the way back:

    workers.py      one worker's logs, bell and status; the thread that reads its results
    answers.py      a result record -> the body the SDK reads (pure)
    retrieval.py    retrieve_future: the long poll, and why there is no answer yet
"""
