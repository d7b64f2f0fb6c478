"""sample.py --chat, typed into as a person does, through a pseudo-terminal, and through a pipe."""

import json
import os
import pty
import re
import resource
import select
import subprocess
import sys
import time

import pytest
from conftest import ROOT, write_chatterbox

from fledge.tokenizer import byte_tokenizer, char_tokenizer

PROMPT = re.escape('\x1b[?2004h')  # from here on lines can be pasted
REPLY = re.compile('[XYZ\ufffd]{5}')


@pytest.fixture
def folder(tmp_path):
    write_chatterbox(tmp_path / 'out', byte_tokenizer(), 'XYZ\x1b', 1 << 16)
    return tmp_path


class Terminal:
    """A conversation that runs in a pseudo-terminal of its own."""

    def __init__(self, folder, *flags, largest_file=resource.RLIM_INFINITY):
        child, self.number = pty.fork()
        if not child:
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
            # which would ask this terminal where its cursor is
            environment = os.environ | dict(
                XDG_STATE_HOME=str(folder / 'state'), PROMPT_TOOLKIT_NO_CPR='1', TERM='xterm'
            )
            script = os.path.join(ROOT, 'sample.py')
            flags = ('--chat', '--max_new_tokens=60000', '--temperature=1', *flags)
            os.execve(sys.executable, [sys.executable, script, *flags], environment)
        self.child, self.output = child, ''
        self.seen = 0  # characters of the output that an earlier wait() found its text in

    def read(self, deadline):
        """Read what comes next; False at the end."""
        ready, _, _ = select.select([self.number], [], [], max(0, deadline - time.monotonic()))
        assert ready, f'nothing came any more behind {self.output!r}'
        try:
            new = os.read(self.number, 1 << 16)
        except OSError:  # Linux's way to say that the other side is closed
            return False
        self.output += new.decode(errors='replace')
        return bool(new)

    def wait(self, pattern):
        """Wait until a text that the pattern finds comes behind those that were waited for."""
        deadline = time.monotonic() + 90
        while not (found := re.search(pattern, self.output[self.seen :])):
            assert self.read(deadline), f'it ended: {self.output!r}'
            assert time.monotonic() < deadline, f'{pattern} did not come: {self.output[-2000:]!r}'
        self.seen += found.end()
        return found[0]

    def type(self, keys):
        """Type at the prompt."""
        self.wait(PROMPT)
        os.write(self.number, keys.encode(errors='surrogateescape'))

    def interrupt(self):
        os.write(self.number, b'\x03')

    def exit_code(self):
        deadline = time.monotonic() + 90
        while self.read(deadline):
            pass
        os.close(self.number)
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


def through_pipe(folder, lines, *flags):
    """Exit code, stdout and stderr of a conversation whose user is a pipe."""
    flags = ['--chat', '--max_new_tokens=30', '--temperature=1', *flags]
    command = [sys.executable, os.path.join(ROOT, 'sample.py'), *flags]
    done = subprocess.run(command, input=lines, cwd=folder, capture_output=True, timeout=300)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def contents(path):
    return [(m['role'], m['content']) for m in json.loads(path.read_text())['messages']]


@pytest.mark.slow
def test_a_reply_is_stopped_and_the_conversation_goes_on(folder):
    terminal = Terminal(folder)
    terminal.type('Où est 漢字 😀?\r')
    terminal.wait(REPLY)
    terminal.interrupt()
    terminal.wait('tokens, ')
    terminal.type('//help\x1b\rno command\r')  # Alt-Enter
    terminal.wait(REPLY)
    terminal.interrupt()
    terminal.type('/save one.json\r')
    terminal.wait('one.json has 4 messages')
    terminal.type('/retry\r')
    terminal.wait(REPLY)
    terminal.interrupt()
    terminal.type('/save two.json\r')
    terminal.wait('two.json has 4 messages')
    terminal.type('\x04')  # Ctrl-D
    assert terminal.exit_code() == 0
    one, two = contents(folder / 'one.json'), contents(folder / 'two.json')
    assert [role for role, _ in one] == ['user', 'assistant'] * 2
    assert one[0][1] == 'Où est 漢字 😀?' and one[2][1] == '/help\nno command'
    assert 5 <= len(one[1][1]) < 60000 and re.fullmatch('[XYZ\x1b]+', one[1][1])
    assert two[:3] == one[:3] and two[3] != one[3]


@pytest.mark.slow
def test_lines_are_edited_pasted_and_remembered(folder):
    terminal = Terminal(folder, '--max_new_tokens=5')
    terminal.type('a line\\\ranother lime\x7f\x7fne\r')
    terminal.type('\x1b[200~pasted\nlines\x1b[201~\r')
    terminal.type('no UTF-8: \udcff\r')
    terminal.type('not to be sent\x03sent\r')
    terminal.type('/save talk.json\r')
    terminal.type('\x03')
    terminal.wait('once more')
    terminal.type('\x03')
    assert terminal.exit_code() == 0
    users = [text for role, text in contents(folder / 'talk.json') if role == 'user']
    assert users == ['a line\nanother line', 'pasted\nlines', 'no UTF-8: ?', 'sent']
    later = Terminal(folder, '--max_new_tokens=5')
    later.type('\x1b[A\x1b[A\r')  # up, twice: before /save
    later.type('/save later.json\r')
    later.type('/quit\r')
    assert later.exit_code() == 0
    assert contents(folder / 'later.json')[0] == ('user', 'sent')


@pytest.mark.slow
def test_a_full_disk_loses_nothing(folder):
    terminal = Terminal(folder, '--max_new_tokens=5', largest_file=10)
    terminal.type('hello\r')
    terminal.type('/save talk.json\r')
    terminal.wait('error: cannot write talk.json: File too large')
    terminal.type('/retry\r')
    terminal.wait('5 tokens')
    terminal.type('\x04')
    assert terminal.exit_code() == 0 and not (folder / 'talk.json').exists()


@pytest.mark.slow
def test_a_pipe_is_a_user_as_well(folder):
    (folder / 'broken.json').write_text('{"messages": [')
    lines = 'hello\n/system Be brief.\n/system\nÉ 漢\n/save talk.json\n/reset\n/save none.json\n'
    lines += '/load talk.json\n/retry\n/sytem x\n/load broken.json\n/load nowhere\n/save\n'
    lines += '/save nowhere/talk.json\n/help\n'
    code, out, err = through_pipe(folder, lines.encode() + b'\xff\r\n/save last.json')
    assert code == 0
    replies = out.splitlines()
    assert len(replies) == 4 and all(re.fullmatch('[XYZ\ufffd]{30}', reply) for reply in replies)
    saved = contents(folder / 'talk.json')
    assert saved[0] == ('system', 'Be brief.') and saved[3] == ('user', 'É 漢')
    assert contents(folder / 'none.json') == saved[:1]
    last = contents(folder / 'last.json')
    assert last[:4] == saved[:4] and last[4] != saved[4] and last[5] == ('user', '\ufffd')
    errors = [line for line in err.splitlines() if line.startswith('error: ')]
    assert 'error: /sytem is no command: did you mean /system? /help lists them' in errors
    assert 'broken.json is no valid JSON' in errors[1] and 'nowhere' in errors[2]
    assert errors[3] == 'error: /save needs the name of a file'
    assert 'cannot write nowhere/talk.json' in errors[4] and len(errors) == 5
    assert err.startswith('Be brief.\n') and '/retry' in err


@pytest.mark.slow
def test_a_full_context_is_said_once_and_a_message_beyond_it_is_refused(tmp_path):
    write_chatterbox(tmp_path / 'out', byte_tokenizer(), 'XYZ\x1b', 256)
    lines = ['a' * 60] * 8 + ['b' * 300, 'c']
    code, out, err = through_pipe(tmp_path, '\n'.join(lines).encode())
    assert code == 0 and len(out.splitlines()) == 9
    assert (
        err.count('the context is full') == 1 and err.count('error: the message is too long') == 1
    )


@pytest.mark.slow
def test_a_model_without_a_form_for_conversations_goes_on_with_the_text(tmp_path):
    write_chatterbox(tmp_path / 'out', char_tokenizer('abcXYZ\x1b'), 'XYZ\x1b', 256)
    code, out, err = through_pipe(tmp_path, b'abc\nd\nba\n/save talk.json\n')
    assert code == 0 and 'was never tuned for conversations' in err
    assert "error: the character 'd' is not in this vocabulary" in err
    assert [m[0] for m in contents(tmp_path / 'talk.json')] == ['user', 'assistant'] * 2
