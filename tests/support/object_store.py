"""An object store on loopback: moto's S3, which can cut connections and throttle."""

import threading
from contextlib import contextmanager


class Store:
    """Its address, and what goes wrong: of the next requests for objects, `cut` break off and `slow` are refused.

    `ranges` are the bytes that were asked for, `sent` counts the writes; from the write number `stop_at` on, `stuck`
    is set and writes hang.
    """

    def __init__(self):
        self.address, self.cut, self.slow = "", 0, 0
        self.ranges, self.sent, self.stop_at = [], 0, None
        self.stuck = threading.Event()


def _faulty(application, store):
    def serve(environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        wanted = environ.get("HTTP_RANGE")
        if method == "PUT" and path.count("/") > 1:
            store.sent += 1
            if store.stop_at is not None and store.sent >= store.stop_at:
                store.stuck.set()
                threading.Event().wait(60)
        if method == "GET" and wanted:
            store.ranges.append(wanted)
            if store.slow:
                store.slow -= 1
                body = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
                start_response("503 Slow Down", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
                return [body]
        parts = application(environ, start_response)
        if method == "GET" and wanted and store.cut:
            store.cut -= 1
            whole = b"".join(parts)
            return [whole[: len(whole) // 2]]  # less than the header says, and the connection is closed
        return parts

    return serve


@contextmanager
def serving():
    """The store, as `Store`."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    store = Store()
    application = _faulty(DomainDispatcherApplication(create_backend_app), store)
    server = make_server("127.0.0.1", 0, application, threaded=True)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    store.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
