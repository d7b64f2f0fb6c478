"""A Hugging Face hub on this machine, for tests: nothing leaves it, and it can be made to fail.

    with Hub() as hub:
        hub.add('someone/stories', {'data/train.parquet': parquet_bytes([{'text': 'hi'}] * 100)})
        hub.files['a.json.gz'] = gzip.compress(b'{"text": "hi"}')
        hub.fail('train.parquet', after_bytes=5000, times=2)
        subprocess.run([...], env=os.environ | hub.env)

The second is at hub.url('a.json.gz'), outside any repo; the environment is read when datasets is
imported. It stands in for what huggingface_hub 1 and 2 and datasets ask of huggingface.co when a
public data set is streamed, or files of it or of a model are downloaded: a repo's commit, its list
of files, and the files, whole or by range. There is no git, no Xet storage, no redirect to another
host and no login.
"""

import contextlib
import hashlib
import http.server
import io
import json
import re
import tempfile
import threading
from urllib.parse import parse_qs, unquote, urlsplit


def parquet_bytes(rows, row_group_size=None):
    """A parquet file of these rows (dicts), with row_group_size rows in each of its groups."""
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), buffer, row_group_size=row_group_size
    )
    return buffer.getvalue()


class Hub:
    """Repos and plain files behind http://127.0.0.1:<port>, while the `with` block lasts.

    down = True: every request is answered 503, as when the hub is out of service; down = False
    brings it back. gated: the names of repos whose files are answered 401 (403 to a request with a
    token). requests: every request so far, as (method, path). A request for another host comes here
    too, as to a proxy: its path is then a whole URL, or the host:port of a CONNECT, and it is
    answered 502.
    """

    def __init__(self):
        self.repos, self.files, self.gated, self.failing, self.requests, self.down = (
            {},
            {},
            set(),
            [],
            [],
            False,
        )
        self.server = http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), type('Handler', (Handler,), {'hub': self})
        )
        self.endpoint = f'http://127.0.0.1:{self.server.server_port}'

    def __enter__(self):
        self.home = tempfile.TemporaryDirectory(prefix='hub-')
        threading.Thread(
            target=self.server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.home.cleanup()

    @property
    def env(self):
        """What a script's environment needs for this hub to be its hub.

        Its downloads go into a folder that is removed at the end.
        """
        return {
            'HF_ENDPOINT': self.endpoint,
            'HF_HOME': self.home.name,
            'HF_HUB_OFFLINE': '0',
            'HF_DATASETS_OFFLINE': '0',
            'HF_TOKEN': '',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'http_proxy': self.endpoint,
            'https_proxy': self.endpoint,
            'no_proxy': '127.0.0.1,localhost',
        }

    def add(self, repo, files, revision='main'):
        """Put the repo of a data set or a model there: {path: bytes or str}.

        Each revision is added for itself; a later call replaces it.
        """
        files = {
            path: data.encode() if isinstance(data, str) else data for path, data in files.items()
        }
        commit = hashlib.sha1(repr((repo, revision, sorted(files.items()))).encode()).hexdigest()
        self.repos.setdefault(repo, {})[revision] = (commit, files)

    def url(self, name):
        """The address of one of `files`.

        Its host is called localhost, since datasets takes any address at HF_ENDPOINT for a repo's.
        """
        return f'http://localhost:{self.server.server_port}/files/{name}'

    def fail(self, part, after_bytes=None, times=None):
        """Files with `part` in their URL break, for the next `times` requests of that byte.

        The connection closes before the byte numbered after_bytes, whenever a request comes to it
        (None: before the first byte of every request), until failing.clear() where times is None.
        A small parquet file is read in one request, schema and all, and a large one from its end:
        to break in the midst of a run, break the second file or a byte amid the first.
        """
        self.failing.append([part, after_bytes, times])


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub, method = self.hub, self.command
        body = self.rfile.read(
            int(self.headers.get('Content-Length', 0))
        ).decode()  # only paths-info has one
        hub.requests.append((method, self.path))
        if hub.down:
            return self.answer(503, b'')
        if not self.path.startswith('/'):  # meant for another host
            return self.answer(502, b'')
        path = urlsplit(self.path).path
        if path.startswith('/files/'):
            data = hub.files.get(unquote(path[len('/files/') :]))
            return self.answer(404, b'') if data is None else self.send_file(data)
        match = re.fullmatch(
            r'/(?:api/datasets/|datasets/|api/models/)?([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/([^/]+)(?:/(.*))?)?',
            path,
        )
        if not match or match[1] not in hub.repos:
            return self.answer(
                404,
                b'',
                {'X-Error-Code': 'RepoNotFound', 'X-Error-Message': 'Repository not found'},
            )
        repo, what, revision, name = (
            match[1],
            match[2],
            unquote(match[3] or 'main'),
            unquote(match[4] or ''),
        )
        commit, files = next(
            (
                (commit, files)
                for branch, (commit, files) in hub.repos[repo].items()
                if revision in (branch, commit)
            ),
            (None, None),
        )
        if commit is None:
            return self.answer(
                404,
                b'',
                {
                    'X-Error-Code': 'RevisionNotFound',
                    'X-Error-Message': f'Invalid rev id: {revision}',
                },
            )
        if what == 'resolve':
            if repo in hub.gated:
                return self.answer(
                    403 if 'Authorization' in self.headers else 401,
                    b'',
                    {'X-Error-Code': 'GatedRepo'},
                )
            if name not in files:
                return self.answer(
                    404,
                    b'',
                    {
                        'X-Error-Code': 'EntryNotFound',
                        'X-Error-Message': 'Entry not found',
                        'X-Repo-Commit': commit,
                    },
                )
            return self.send_file(files[name], {'X-Repo-Commit': commit})
        if what in ('tree', 'paths-info'):
            entries = {
                path: {
                    'type': 'file',
                    'path': path,
                    'size': len(data),
                    'oid': hashlib.sha1(data).hexdigest(),
                }
                for path, data in files.items()
            }
            folders = {path[: slash.start()] for path in files for slash in re.finditer('/', path)}
            entries |= {
                path: {'type': 'directory', 'path': path, 'size': 0, 'oid': commit}
                for path in folders
            }
            if what == 'paths-info':
                entries = [
                    entries[path] for path in parse_qs(body).get('paths', []) if path in entries
                ]
            else:
                deep = parse_qs(urlsplit(self.path).query).get('recursive') == ['true']
                inside = {
                    path: path.removeprefix(name + '/' if name else '')
                    for path in entries
                    if not name or path.startswith(name + '/')
                }
                entries = [
                    entries[path] for path, rest in inside.items() if deep or '/' not in rest
                ]
                if name and not inside:
                    return self.answer(
                        404,
                        b'',
                        {
                            'X-Error-Code': 'EntryNotFound',
                            'X-Error-Message': f'{name} does not exist on "{revision}"',
                        },
                    )
            return self.answer(200, json.dumps(entries).encode())
        return self.answer(
            200,
            json.dumps(
                {'id': repo, 'sha': commit, 'siblings': [{'rfilename': name} for name in files]}
            ).encode(),
        )

    do_HEAD = do_POST = do_CONNECT = do_GET

    def send_file(self, data, headers=None):
        """Answer with a file, or the range that was asked for; cut short where fail() says so."""
        headers = headers or {}
        asked = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        start, end = (
            (int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data)))
            if asked
            else (0, len(data))
        )
        if asked and start >= len(data):
            return self.answer(416, b'', {'Content-Range': f'bytes */{len(data)}'})
        headers = headers | {
            'ETag': f'"{hashlib.sha1(data).hexdigest()}"',
            'Accept-Ranges': 'bytes',
        }
        if asked:
            headers |= {'Content-Range': f'bytes {start}-{end - 1}/{len(data)}'}
        for broken in self.hub.failing:
            part, after_bytes, times = broken
            at = start if after_bytes is None else after_bytes
            if (
                self.command == 'GET'
                and part in unquote(self.path)
                and start <= at < end
                and times != 0
            ):
                broken[2] = None if times is None else times - 1
                return self.answer(
                    206 if asked else 200, data[start:at], headers | {'Content-Length': end - start}
                )
        self.answer(206 if asked else 200, data[start:end], headers)

    def answer(self, status, body, headers=None):
        with contextlib.suppress(ConnectionError):  # who asked has gone
            self.send_response(status)
            for name, value in ({'Content-Length': len(body)} | (headers or {})).items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != 'HEAD':
                self.wfile.write(body)

    def log_message(self, *_):
        """Nothing on stderr."""
