"""What records say: the text, conversation or preference in one, or Skip with the reason why it has none."""

from prepare.sources import Skip


def text_of(record, field):
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


def exchange(question, answer):
    """A conversation of one question and its answer."""
    return _checked([dict(role='user', content=question), dict(role='assistant', content=answer)])


def instruction_of(record):
    """The question of a record in Alpaca's form: its instruction, and the input to it where there is one."""
    context = text_of(record, 'input') if record.get('input') else ''
    return '\n\n'.join(
        part for part in (text_of(record, 'instruction').strip(), context.strip()) if part
    )


def conversation(record):
    """The messages of a record: [{'role', 'content'}, ...] in its field messages, or Alpaca's instruction, input, output."""
    if isinstance(record, dict) and record.get('messages') is not None:
        return _checked(record['messages'])
    if isinstance(record, dict) and 'instruction' in record:
        return exchange(instruction_of(record), text_of(record, 'output'))
    raise Skip(
        "no field 'messages', and none 'instruction'" if isinstance(record, dict) else 'no object'
    )


def preference(record):
    """The chosen and the rejected conversation of a record, of which what follows the prompt is learned.

    The prompt is a text or messages (or Alpaca's instruction and input); so are chosen and rejected, where messages may
    repeat the prompt or be all there is of it.
    """
    if not isinstance(record, dict):
        raise Skip('no object')
    prompt = record.get('prompt')
    if prompt is None:
        prompt = instruction_of(record) if 'instruction' in record else []
    prompt = [dict(role='user', content=prompt)] if isinstance(prompt, str) else prompt
    if not isinstance(prompt, list):
        raise Skip('a prompt that is neither a text nor messages')
    pair = []
    for field in ('chosen', 'rejected'):
        answer = record.get(field)
        if isinstance(answer, list):
            pair.append(
                _checked(answer if prompt and answer[: len(prompt)] == prompt else prompt + answer)
            )
        elif prompt:
            pair.append(_checked(prompt + [dict(role='assistant', content=text_of(record, field))]))
        else:
            raise Skip("no field 'prompt'")
    if pair[0] == pair[1]:
        raise Skip('chosen and rejected are the same')
    shared = next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), min(map(len, pair)))
    return [
        [
            message | dict(learned=i >= shared and message['role'] == 'assistant')
            for i, message in enumerate(messages)
        ]
        for messages in pair
    ]


def _checked(messages):
    """Messages with roles and texts that a chat may have, without the space around them; Skip where they are not so."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Skip('messages that are no list of objects')
    for message in messages:
        if message.get('role') not in ('system', 'user', 'assistant'):
            raise Skip(
                f'a role {str(message.get("role"))[:20]!r}; roles are system, user and assistant'
            )
        if not text_of(message, 'content').strip():
            raise Skip('an empty message')
    if not any(message['role'] == 'assistant' for message in messages):
        raise Skip('no message of the assistant')
    return [dict(role=message['role'], content=message['content'].strip()) for message in messages]


def is_title(row, before):
    """Whether a row of WikiText, which is a line, begins an article: ' = Its title = ' between empty rows; before: the row before it."""
    return (
        row['text'].startswith(' = ')
        and row['text'].rstrip('\n').endswith(' = ')
        and not row['text'].startswith(' = =')
        and not (before and before['text'].strip())
    )


def article(rows):
    """The text of an article of WikiText."""
    return ''.join(row['text'] or '\n' for row in rows)
