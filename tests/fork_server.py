"""A process that has imported what scripts need, and forks one child for each script.

Most of a short script's time is the import of torch, of what the first optimizer imports, and of
matplotlib. A child that is forked runs the script as Python by itself does: with its own folder,
environment, arguments, standard streams, signals and exit code. For the processes that it starts
itself, `sys.executable` is a small program that has the server fork them as well.

`python fork_server.py FOLDER MODULE ...` imports the modules, and serves at FOLDER/socket until its
standard input ends. FOLDER/python is that program.
"""

import array
import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing
import multiprocessing.spawn
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types

WIDTH = 12  # characters of a pid or an exit code


def ask(folder, command, cwd, env, streams):
    """Have a server run what `python *command` runs; returns the pid and the connection.

    streams: {file descriptor in that process: the one here}. On the connection the exit code comes,
    for hear(); where it is closed before, the child is killed.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.path.join(folder, 'socket'))
    job = dict(command=command, cwd=str(cwd), env=dict(env), streams=list(streams))
    job = json.dumps(job).encode()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', streams.values()))
    connection.sendmsg([len(job).to_bytes(4, 'little')], [rights])
    connection.sendall(job)
    return hear(connection), connection


def hear(connection):
    """The next number that the server sends."""
    return int(connection.recv(WIDTH, socket.MSG_WAITALL))


def run_here(job, streams):
    """Be the process that the job describes; does not return."""
    os.chdir(job['cwd'])
    os.environ.clear()
    os.environ.update(job['env'])
    import fcntl  # which Windows lacks, and conftest.py imports this file there too

    # none of them may lie where another one belongs
    apart = [fcntl.fcntl(stream, fcntl.F_DUPFD, max(job['streams']) + 1) for stream in streams]
    for stream in streams:
        os.close(stream)
    for number, stream in zip(job['streams'], apart, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, 'w')
    sys.stderr = os.fdopen(2, 'w', buffering=1, errors='backslashreplace')
    first, *args = job['command']
    sys.argv = [first, *args[first in ('-c', '-m') :]]
    sys.path[0] = job['cwd'] if first in ('-c', '-m') else os.path.dirname(first)
    code = 0
    try:
        if first == '-c':
            exec(args[0], sys.modules['__main__'].__dict__)
        elif first == '-m':
            runpy.run_module(args[0], run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(first, run_name='__main__')
    except SystemExit as e:
        code = 0 if e.code is None else e.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as e:
        code = -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
        sys.stdout.flush()
    leave(code)


def leave(code):
    """End this process as one with this exit code ended, by a signal where it is negative."""
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def receive(connection):
    """The job that ask() sends, and its streams."""
    size = 100 * array.array('i').itemsize
    head, rights, *_ = connection.recvmsg(4, socket.CMSG_LEN(size))
    streams = array.array('i')
    for _, _, data in rights:
        streams.frombytes(data)
    left, parts = int.from_bytes(head, 'little'), []
    while left:
        parts.append(connection.recv(left))
        left -= len(parts[-1])
    return json.loads(b''.join(parts)), list(streams)


def serve(folder):
    """Fork a child for each job until standard input ends."""
    sys.executable = os.path.join(folder, 'python')
    multiprocessing.set_executable(sys.executable)
    sys.modules['__main__'] = types.ModuleType('__main__')
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.join(folder, 'socket'))
    server.listen(64)
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    running = {}  # pid: connection
    print('ready', flush=True)
    while True:
        ready = select.select([0, woken, server, *running.values()], [], [])[0]
        if 0 in ready:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            return
        for pid, connection in list(running.items()):
            if connection in ready:  # nobody waits for it any more
                os.kill(pid, signal.SIGKILL)
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 1000)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            with running.pop(pid) as connection, contextlib.suppress(OSError):
                connection.sendall(b'%*d' % (WIDTH, os.waitstatus_to_exitcode(status)))
        if server in ready:
            connection = server.accept()[0]
            job, streams = receive(connection)
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (server, connection, *running.values()):
                    other.close()
                os.close(woken), os.close(wake)
                run_here(job, streams)
            for stream in streams:
                os.close(stream)
            connection.sendall(b'%*d' % (WIDTH, pid))
            running[pid] = connection


def is_open(number):
    """Whether there is such a file descriptor, and a process that is begun here has it too."""
    with contextlib.suppress(OSError):
        return os.get_inheritable(number)
    return False


def be_python(folder, args):
    """Run `python args` in a child of the server, and end as it ends."""
    command = list(args)
    while command[0][0] == '-' and command[0] not in ('-c', '-m'):
        del command[0]  # what Python is told of itself, such as -u, as torchrun does
    streams = [int(name) for name in os.listdir('/dev/fd')]
    streams = {number: number for number in streams if is_open(number)}
    pid, connection = ask(folder, command, os.getcwd(), os.environ, streams)
    for number in streams:  # so that what ends there is seen to end at the other end
        if number > 2:
            os.close(number)

    def pass_on(number, _):
        with contextlib.suppress(ProcessLookupError):  # it has just ended: its code is under way
            os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    leave(hear(connection))


PYTHON = f"""#!{sys.executable} -IS
import sys
sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})
import fork_server
fork_server.be_python({{folder!r}}, sys.argv[1:])
"""

if __name__ == '__main__':
    folder, *modules = sys.argv[1:]
    program = os.path.join(folder, 'python')
    with open(program, 'w') as f:
        f.write(PYTHON.format(folder=folder))
    os.chmod(program, 0o755)
    for module in modules:
        with contextlib.suppress(ImportError):  # then no script has it either
            importlib.import_module(module)
    gc.freeze()  # a child does not look through all that was imported, nor copy it
    serve(folder)
