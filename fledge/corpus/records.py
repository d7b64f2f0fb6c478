"""What records say: a text, a conversation or a pair of them, or Skip with the reason why not."""

from fledge.corpus.sources import Skip

ROLES = dict(human='user', prompter='user', gpt='assistant', model='assistant', bot='assistant')
# Fields of a question and its answer. Alpaca's question may have an `input` beside it.
EXCHANGES = (
    ('instruction', 'output'),
    ('prompt', 'completion'),
    ('prompt', 'response'),
    ('question', 'answer'),
)


def text_of(record: object, field: str) -> str:
    """The text in a field of a record; a record that is a text (a whole file) is it itself."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise Skip('no object')
    if record.get(field) is None:
        raise Skip(f'no field {field!r}')
    if not isinstance(record[field], str):
        raise Skip(f'a field {field!r} that is no text')
    return record[field]


def labelled(text: str, word: str) -> list:
    """The document of a text with a label, of which the label is learned: pieces."""
    return [(f'{text}\n\nLabel:', 0), (f' {word}', 1)]


def translated(source: str, target: str, separator: str) -> list:
    """The document of a source and its target, of which the target is learned: pieces.

    The first separator in it is the one behind the source. Skip for a source that has one itself.
    """
    if not source:
        raise Skip('an empty source')
    if not target:
        raise Skip('an empty target')
    if separator in source:
        raise Skip(f'a source with {separator!r} in it, which is what ends a source')
    return [(f'{source}{separator}', 0), (target, 1)]


def exchange(question: str, answer: str) -> list[dict]:
    """A conversation of one question and its answer."""
    return _checked([dict(role='user', content=question), dict(role='assistant', content=answer)])


def conversation(record: object) -> list[dict]:
    """The messages of a record, in any of the forms that conversations have.

    A list in `messages` (role and content) or `conversations` (ShareGPT's from and value); or a
    question and its answer in the fields of EXCHANGES, texts or such lists. `system` comes first.
    """
    if not isinstance(record, dict):
        raise Skip('no object')
    messages = [dict(role='system', content=record['system'])] if record.get('system') else []
    for field in ('messages', 'conversations'):
        if record.get(field) is not None:
            return _checked(messages + _turns('', record[field]))
    for asked, answered in EXCHANGES:
        if record.get(asked) is not None and (asked == 'instruction' or answered in record):
            question = _instruction(record) if asked == 'instruction' else record[asked]
            answer = record.get(answered)
            if answer is None:
                raise Skip(f'no field {answered!r}')
            return _checked(messages + _turns('user', question) + _turns('assistant', answer))
    raise Skip(f'no conversation; it has {", ".join(map(str, record))[:80]}')


def _turns(role, said):
    """What is said, a text by role or a list of messages, as such a list."""
    if role and not isinstance(said, list):
        return [dict(role=role, content=said)]
    turns = []
    for message in said if isinstance(said, list) else [said]:
        if not isinstance(message, dict):
            raise Skip('messages that are no list of objects')
        speaker = message.get('role', message.get('from'))
        content = message.get('content', message.get('value'))
        turns.append(dict(role=ROLES.get(str(speaker), speaker), content=content))
    return turns


def preference(record: object) -> list[list[dict]]:
    """The chosen and the rejected conversation, of which what follows the prompt is learned.

    The prompt is a text or messages, also ShareGPT's (or Alpaca's instruction and input); so are
    chosen and rejected, where messages may repeat the prompt or be all there is of it.
    """
    if not isinstance(record, dict):
        raise Skip('no object')
    prompt = record.get('prompt')
    if prompt is None:
        prompt = _instruction(record) if 'instruction' in record else []
    prompt = _turns('user', prompt)
    pair = []
    for field in ('chosen', 'rejected'):
        answer = record.get(field)
        if not isinstance(answer, list):
            if not prompt:
                raise Skip("no field 'prompt'")
            answer = text_of(record, field)
        answer = _turns('assistant', answer)
        if answer[: len(prompt)] == prompt:
            answer = answer[len(prompt) :]
        pair.append(_checked(prompt + answer))
    chosen, rejected = pair
    if chosen == rejected:
        raise Skip('chosen and rejected are the same')
    shared = 0  # messages that both begin with
    while chosen[shared : shared + 1] == rejected[shared : shared + 1]:
        shared += 1
    for messages in pair:
        for i, message in enumerate(messages):
            message['learned'] = i >= shared and message['role'] == 'assistant'
        if not any(message['learned'] for message in messages):
            raise Skip('a chosen or rejected without an answer of its own')
    return pair


def _instruction(record):
    """The question of a record in Alpaca's form: instruction, and input where there is one."""
    question = text_of(record, 'instruction')
    context = text_of(record, 'input') if record.get('input') else ''
    return '\n\n'.join(part for part in (question, context) if part.strip())


def _checked(messages):
    """The same messages where a chat may have them; Skip where not."""
    for message in messages:
        role = message.get('role')
        if role not in ('system', 'user', 'assistant'):
            raise Skip(f'a role {str(role)[:20]!r}; roles are system, user and assistant')
        if not text_of(message, 'content').strip():
            raise Skip('an empty message')
    if not any(message['role'] == 'assistant' for message in messages):
        raise Skip('no message of the assistant')
    return messages


def is_title(row: dict, before: dict) -> bool:
    """Whether a line of WikiText begins an article: ' = Its title = ' behind an empty line."""
    text = row['text'].rstrip('\n')
    title = text.startswith(' = ') and text.endswith(' = ') and not text.startswith(' = =')
    return title and not before['text'].strip()


def article(rows: list[dict]) -> str:
    """The text of an article of WikiText."""
    return ''.join(row['text'] or '\n' for row in rows)
