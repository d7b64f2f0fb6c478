"""A conversation in the terminal."""

import difflib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress

from fledge import UserError
from fledge.conversation import Conversation

COMMANDS = {
    '/reset': 'forget what was said; the system prompt stays',
    '/system': 'TEXT: what the model is told before all else (-: nothing); without a text, show it',
    '/save': 'FILE: write the conversation as JSON',
    '/load': 'FILE: go on with a conversation that was saved',
    '/retry': 'answer the last message again',
    '/help': 'this list',
    '/quit': 'end, as Ctrl-D does',
}
KEYS = (
    'Ctrl-C stops a reply; at the prompt it clears the line, and pressed again ends',
    'Alt-Enter, or a backslash at the end of a line, begins another line of a message',
    '//text is the message /text, and no command',
)
# Characters that would drive the terminal, as an escape sequence does.
CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f]')


def talk(conversation: Conversation, name: str) -> None:
    """Talk with a model until the user ends it.

    In a terminal a message is edited as a line of a shell is, and the messages of earlier sessions
    are kept in the user's state folder; from a pipe each line is a message. Replies go to stdout as
    they come, all else to stderr. name: the model's, to greet with.
    """
    sys.stdin.reconfigure(errors='replace')
    sys.stdout.reconfigure(errors='replace')  # a terminal that lacks a character shows another
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    read_message = line_editor() if is_terminal else read_line
    if not conversation.is_chat:
        note(f'{name} was never tuned for conversations: it goes on with the text that you give')
    if is_terminal:
        note(f'{name}: /help lists what you can do, Ctrl-D ends')
    interrupted, was_trimmed = False, False
    while True:
        try:
            text = read_message()
            interrupted = False
            start = time.perf_counter()
            pieces = answer(conversation, text)
            if pieces is None:
                continue
            stream(pieces)
            if is_terminal:
                note(counts(conversation, time.perf_counter() - start))
            if conversation.n_trimmed and not was_trimmed:
                note('the context is full: from now on the oldest messages are left out')
            was_trimmed = conversation.n_trimmed > 0
        except UserError as e:
            note(f'error: {e}')
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            note('Ctrl-C once more ends, as Ctrl-D does')
        except EOFError:
            return


def answer(conversation: Conversation, text: str) -> Generator[str] | None:
    """The pieces of the reply to a line of the user's, or None where a command has none."""
    if not text.strip():
        return None
    if text.startswith('//'):
        return conversation.say(text[1:])
    if not text.startswith('/'):
        return conversation.say(text)
    command, *words = text.split(maxsplit=1)
    rest = ''.join(words).strip()
    if command in ('/save', '/load') and not rest:
        raise UserError(f'{command} needs the name of a file')
    path = os.path.expanduser(rest)
    if command == '/retry':
        return conversation.retry()
    if command == '/reset':
        conversation.reset()
        note('all that was said is forgotten')
    elif command == '/system' and rest:
        conversation.system = '' if rest == '-' else rest
    elif command == '/system':
        note(conversation.system or 'there is no system prompt')
    elif command == '/save':
        conversation.save(path)
        note(f'{path} has {len(conversation.messages)} messages')
    elif command == '/load':
        conversation.load(path)
        note(f'{path} has {len(conversation.messages)} messages')
    elif command == '/help':
        for known, what in COMMANDS.items():
            note(f'{known} {what}')
        for line in KEYS:
            note(line)
    elif command == '/quit':
        raise EOFError
    else:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        meant = f'did you mean {near[0]}? ' if near else ''
        raise UserError(f'{command} is no command: {meant}/help lists them')
    return None


def stream(pieces: Generator[str]) -> None:
    """Print a reply, a generator of texts, as it comes; Ctrl-C closes the generator."""
    stops = []
    # a flag: an exception in the middle of a step would leave a KV cache that is half written
    before = signal.signal(signal.SIGINT, lambda *_: stops.append(True))
    try:
        for piece in pieces:
            print(visible(piece), end='', flush=True)
            if stops:
                break
    finally:
        pieces.close()
        signal.signal(signal.SIGINT, before)
    print(flush=True)


def counts(conversation: Conversation, seconds: float) -> str:
    """A line on what the last reply took."""
    n, n_prompt = len(conversation.reply.ids), len(conversation.reply.prompt)
    n_cached = n_prompt - conversation.reply.n_read
    return f'{n} tokens, {n / seconds:.1f} a second; {n_cached} of {n_prompt} before it were cached'


def visible(text: str) -> str:
    """text with a sign for each control character, but for line ends and tabs."""
    return CONTROL.sub('\ufffd', text)


def note(text: str) -> None:
    """Print what is not the model's: to stderr, dim in a terminal."""
    look = '\x1b[2m{}\x1b[0m' if sys.stderr.isatty() else '{}'
    print(look.format(visible(text)), file=sys.stderr, flush=True)


def read_line() -> str:
    """A message from stdin, a line; EOFError at its end."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip('\r\n')


def line_editor() -> Callable[[], str]:
    """A function that reads a message in the terminal; EOFError for Ctrl-D, KeyboardInterrupt."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings

    class History(FileHistory):
        def load_history_strings(self):
            with suppress(OSError):  # a file or a folder that is not the user's
                yield from super().load_history_strings()

        def store_string(self, string):
            with suppress(OSError, UnicodeError):  # nor is a full disk a reason not to talk
                super().store_string(string)

    state = os.environ.get('XDG_STATE_HOME') or os.path.expanduser('~/.local/state')
    folder = os.path.join(state, 'fledge')
    with suppress(OSError):
        os.makedirs(folder, mode=0o700, exist_ok=True)  # what was said is nobody else's business
    keys = KeyBindings()
    session = PromptSession(
        history=History(os.path.join(folder, 'chat_history')), key_bindings=keys
    )
    buffer = session.default_buffer

    @keys.add('escape', 'enter')
    def begin_line(event):
        buffer.insert_text('\n')

    @keys.add('enter', filter=Condition(lambda: buffer.document.text_before_cursor.endswith('\\')))
    def begin_line_for_backslash(event):
        buffer.delete_before_cursor()
        buffer.insert_text('\n')

    @keys.add('c-c', filter=Condition(lambda: buffer.text != ''))
    def clear(event):
        buffer.reset()

    def edit():
        text = session.prompt('> ', prompt_continuation='. ')
        return text.encode(errors='replace').decode()  # bytes that are no UTF-8 are surrogates

    return edit
