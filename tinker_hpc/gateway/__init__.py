"""Step 3 of a request: Tinker's wire protocol on 127.0.0.1, in its own process, never waiting for a GPU.

__main__.py     the process: port, key, gateway.json, uvicorn
app.py          routes, thin: HTTP in, a call on the desk, HTTP out
guard.py        who may ask at all: key, Host header, body size
wire.py         protobuf and JSON <-> plain values (pure)
validate.py     is this request right? If not: what was given, what was expected, what to change (pure)
sampling.py     the same for sampling requests (pure)
desk.py         one method an endpoint: validates, makes the record, accepts it
intake.py       idempotent and durable: a request id is handed out after the record is on disk
futures.py      what became of each request; wakes the long polls
workers.py      one worker's logs, bell and status; the thread that reads its results
models.py       models and samplers this gateway knows
sessions.py     SDK sessions
checkpoints.py  tinker:// paths and the checkpoint folders behind them
rebuild.py      all of the above again, from the logs, after a restart
"""
