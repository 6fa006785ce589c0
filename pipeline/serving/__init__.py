"""`serve`: an exported detector that answers over HTTP.

    supervisor.py   the command: binds the socket, says what there is to say
    front.py        its event loop, which neither decodes nor computes: whatever happens to the worker, it answers
    app.py          what is answered over HTTP
    bodies.py       what stands in a request, within its limits
    backend.py      the worker as it is known there: asked, watched, replaced when it dies or hangs
    frames.py       what the two processes say to each other
    worker.py       the other process: loads the detector, answers
    answering.py    what a detector answers
    batches.py      threads that decode, one that runs the network on what they have ready

LitServe is not what it is built on: version 0.2.19 answers a body that is neither JSON nor a form, and JSON that is
damaged, by 500 (``BaseRequestHandler._prepare_request``); lets one refused image of a batch refuse the others
(``BatchedLoop``), and decodes a batch one image after the other; compares a timeout with the time in the queue alone;
closes the way of answers before requests in flight are finished (``_perform_graceful_shutdown``); passes each upload
through a manager's process; and brings FastAPI, ZeroMQ, uvloop, OpenTelemetry. Starlette and uvicorn are what it is
made of itself.
"""
