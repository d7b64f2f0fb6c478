"""The page of serve.py in a real browser, on models whose replies are known by their letters."""

import re
import shutil
from contextlib import contextmanager

import pytest
from conftest import start, write_chatterbox

from fledge.tokenizer import byte_tokenizer, char_tokenizer

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
expect = playwright.expect
expect.set_options(timeout=30_000)  # where the machine is busy
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='chromium is not installed')
PRINTABLE = [chr(10)] + [chr(i) for i in range(32, 127)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('page')
    write_chatterbox(folder / 'out-chat', byte_tokenizer(), '<b>', 4096)
    write_chatterbox(folder / 'out-text', char_tokenizer(PRINTABLE), 'xyz', 4096)
    return folder


@contextmanager
def serving(folder, out_dir, *args):
    """A server of that run: its process and its address."""
    process = start(folder, 'serve.py', f'--out_dir={out_dir}', '--port=0', '--device=cpu', *args)
    try:
        for line in process.stdout:
            address = re.search(r'http://127\.0\.0\.1:\d+', line)
            if address:
                break
        else:
            pytest.fail(process.stderr.read())
        yield process, address.group()
    finally:
        process.kill()


@pytest.fixture(scope='module')
def chat(folder):
    with serving(folder, 'out-chat') as (_, address):
        yield address


@pytest.fixture(scope='module')
def completer(folder):
    with serving(folder, 'out-text') as (_, address):
        yield address


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens an address in a new browser profile; at the end no script has failed, and nothing has
    been fetched from elsewhere."""
    contexts, errors, fetched = [], [], set()

    def open_page(address, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on('pageerror', lambda error: errors.append(error))
        page.on('request', lambda request: fetched.add(request.url.removeprefix(address)))
        page.goto(address)
        expect(page.locator('#name')).to_have_text(re.compile('out-'))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    known = {'/', '/v1/models', '/v1/chat/completions', '/v1/completions'}
    known.add('https://elsewhere.invalid/')  # which a test below asks for in vain
    assert {path for path in fetched if not path.startswith('data:')} <= known


def whole(page):
    """Wait until no reply is coming."""
    page.locator('body:not(.busy)').wait_for()


def say(page, words):
    page.fill('#input', words)
    page.press('#input', 'Enter')
    whole(page)


def change(page, **settings):
    page.click('text=Settings')
    for name, value in settings.items():
        page.fill(f'[name={name}]', value)
    page.click('text=Done')


def replies(page):
    return page.locator('.assistant .text').all_text_contents()


def written(page):
    """The number of tokens that the page gives for the last reply."""
    return int(re.search(r'(\d+) tokens ·', page.locator('.foot span').last.text_content())[1])


@pytest.mark.slow
def test_a_reply_comes_and_its_tokens_are_counted(visit, chat):
    page = visit(chat)
    change(page, max_tokens='3', temperature='0')
    say(page, 'Hello')
    say(page, 'and on')
    first, second = replies(page)
    assert first == second and len(first) == 3 and set(first) <= set('<b>')
    assert page.locator('.user .text').all_text_contents() == ['Hello', 'and on']
    assert written(page) == 3
    expect(page.locator('.foot span').last).to_have_text(
        re.compile(r'^3 tokens · [\d.]+ tokens/s · context \d+/4096 · cut at the limit$')
    )


@pytest.mark.slow
def test_stop_keeps_what_came(visit, chat):
    page = visit(chat)
    change(page, max_tokens='4000')
    for stop in (lambda: page.keyboard.press('Escape'), lambda: page.click('button:text("Stop")')):
        page.fill('#input', 'Hello')
        page.press('#input', 'Enter')
        expect(page.locator('.assistant .text').last).to_have_text(re.compile('[<b>]{20}'))
        stop()
        whole(page)
        assert 20 <= len(replies(page)[-1]) < 4000
        expect(page.locator('.foot span').last).to_have_text(re.compile('stopped$'))
    assert len(replies(page)) == 2


@pytest.mark.slow
def test_retry_answers_the_last_message_again(visit, chat):
    page = visit(chat)
    change(page, max_tokens='40')
    say(page, 'one')
    say(page, 'two')
    first, second = replies(page)
    page.click('text=Retry')
    whole(page)
    assert replies(page)[0] == first and replies(page)[1] != second
    assert page.locator('.user .text').all_text_contents() == ['one', 'two']
    change(page, seed='7')
    page.click('text=Retry')
    whole(page)
    seeded = replies(page)[1]
    page.click('text=Retry')
    whole(page)
    assert replies(page)[1] == seeded


@pytest.mark.slow
def test_an_earlier_message_is_edited_and_answered_anew(visit, chat):
    page = visit(chat)
    change(page, max_tokens='5')
    for words in ('one', 'two', 'three'):
        say(page, words)
    page.fill('#input', 'not sent')
    page.locator('.user', has_text='two').get_by_text('Edit').click()
    expect(page.locator('#input')).to_have_value('two')
    page.keyboard.press('Escape')
    expect(page.locator('#input')).to_have_value('not sent')
    assert page.locator('.user').count() == 3
    page.locator('.user', has_text='two').get_by_text('Edit').click()
    say(page, 'zwei')
    assert page.locator('.user .text').all_text_contents() == ['one', 'zwei']
    assert len(replies(page)) == 2
    expect(page.locator('#input')).to_have_value('not sent')


@pytest.mark.slow
def test_settings_and_system_prompt_reach_the_server(visit, chat):
    page = visit(chat)
    numbers = dict(temperature=0.5, top_p=0.9, top_k=2, min_p=0.1, repetition_penalty=1.1)
    numbers |= dict(presence_penalty=0.2, frequency_penalty=0.3, max_tokens=30, seed=3)
    change(page, system='Be kind.', stop='>\n\\n', **{k: str(v) for k, v in numbers.items()})
    with page.expect_request('**/chat/completions') as sent:
        say(page, 'Hello')
    body = sent.value.post_data_json
    assert {name: body[name] for name in numbers} == numbers and body['stop'] == ['>', '\n']
    roles = [message['role'] for message in body['messages']]
    assert roles == ['system', 'user'] and body['messages'][0]['content'] == 'Be kind.'
    assert '>' not in replies(page)[0]
    expect(page.locator('.system')).to_have_text('Be kind.')
    page.click('text=Settings')
    page.click("text=Back to the server's settings")
    expect(page.locator('[name=top_k]')).to_have_value('')
    expect(page.locator('[name=system]')).to_have_value('Be kind.')
    page.keyboard.press('Escape')
    change(page, system='', max_tokens='2')
    with page.expect_request('**/chat/completions') as sent:
        say(page, 'again')
    assert not body.keys() & {'system'} and 'top_k' not in sent.value.post_data_json


@pytest.mark.slow
def test_html_is_shown_as_it_is_written(visit, chat):
    page = visit(chat)
    change(page, max_tokens='400', seed='1', system='<i>kind</i>')
    words = "<img src=x onerror=\"document.title='run'\"><script>document.title = 'run'</script>"
    say(page, words)
    expect(page.locator('.user .text')).to_have_text(words)
    expect(page.locator('.assistant .text')).to_contain_text('<b>')
    assert page.locator('#log :is(b, i, script, img)').count() == 0
    assert page.title() != 'run'
    page.evaluate("""() => {
        document.onsecuritypolicyviolation = (event) => (document.title = event.effectiveDirective);
        document.body.append(Object.assign(new Image(), { src: 'https://elsewhere.invalid' }));
    }""")
    expect(page).to_have_title('img-src')  # were there a hole, nothing could be fetched through it


@pytest.mark.slow
def test_code_between_fences_stands_by_itself(visit, chat):
    page = visit(chat)
    change(page, max_tokens='1')
    say(page, 'Mend this:\n```python\nx = <1>\n```\nand say why.')
    parts = page.locator('.user .text > *')
    assert parts.all_text_contents() == ['Mend this:\n', 'x = <1>\n', 'and say why.']
    expect(page.locator('.user pre')).to_have_text('x = <1>\n')


@pytest.mark.slow
def test_a_reload_keeps_the_conversation(visit, chat):
    page = visit(chat)
    change(page, max_tokens='5', system='Be kind.')
    say(page, 'Hello 🪶')
    page.fill('#input', 'not sent yet')
    before = page.locator('#log').inner_text()
    page.reload()
    expect(page.locator('.user .text')).to_have_text('Hello 🪶')
    assert page.locator('#log').inner_text() == before
    expect(page.locator('#input')).to_have_value('not sent yet')
    page.on('dialog', lambda dialog: dialog.accept())
    page.click('text=New')
    page.reload()
    expect(page.locator('.empty')).to_be_visible()
    assert page.locator('article').count() == 0


@pytest.mark.slow
def test_what_is_too_long_for_the_browsers_storage_is_said(visit, chat):
    page = visit(chat)
    page.fill('#input', 'x' * 2_100_000)
    page.click('[aria-label*=dark]')  # which stores its choice, with all the rest
    expect(page.locator('#notice')).to_contain_text('too long to be kept')
    assert len(page.input_value('#input')) == 2_100_000


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_light_and_dark(scheme, visit, chat):
    page = visit(chat, color_scheme=scheme)
    paper = 'getComputedStyle(document.body).backgroundColor'
    colours = dict(light='rgb(251, 250, 247)', dark='rgb(21, 24, 26)')
    assert page.evaluate(paper) == colours[scheme]
    page.click('[aria-label*=dark]')
    other = page.evaluate(paper)
    assert other in colours.values() and other != colours[scheme]
    page.reload()
    assert page.evaluate(paper) == other


@pytest.mark.slow
@pytest.mark.parametrize('width', [320, 360])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(width, visit, chat, completer):
    too_wide = 'document.scrollingElement.scrollWidth > innerWidth || view.scrollWidth > innerWidth'
    phone = dict(viewport=dict(width=width, height=640), has_touch=True, is_mobile=True)
    page = visit(chat, **phone)
    change(page, max_tokens='200')
    say(page, 'x' * 300 + '\n```\n' + 'y' * 300 + '\n```\n')
    for locator in (page.locator('#input'), page.locator('#send'), page.locator('#new')):
        expect(locator).to_be_in_viewport(ratio=1)
    assert not page.evaluate(too_wide)
    page.click('text=Settings')
    assert page.evaluate('panel.scrollWidth <= panel.clientWidth')
    page = visit(completer, **phone)
    page.fill('#text', 'x' * 300)
    page.click('#send')
    whole(page)
    assert not page.evaluate(too_wide)


@pytest.mark.slow
def test_all_of_it_by_keyboard(visit, chat):
    page = visit(chat)
    keys = page.keyboard
    focused = 'document.activeElement.textContent || document.activeElement.id'
    expect(page.locator('#input')).to_be_focused()
    for _ in range(4):  # back over the conversation, the theme and the settings
        keys.press('Shift+Tab')
        if page.evaluate(focused) == 'Settings':
            break
    assert page.evaluate('getComputedStyle(document.activeElement).outlineStyle') == 'solid'
    keys.press('Enter')
    expect(page.locator('#panel')).to_be_visible()
    page.locator('[name=max_tokens]').focus()
    keys.type('4')
    keys.press('Escape')
    expect(page.locator('#panel')).to_be_hidden()
    page.locator('#input').focus()
    keys.type('first')
    keys.press('Shift+Enter')
    keys.type('second')
    page.dispatch_event('#input', 'keydown', dict(key='Enter', isComposing=True))
    assert page.locator('.user').count() == 0  # that Enter ended the composition of a character
    keys.press('Enter')
    whole(page)
    expect(page.locator('.user .text')).to_have_text('first\nsecond')
    expect(page.locator('#input')).to_be_focused()
    assert written(page) == 4
    labels = 'button, input, textarea, main, dialog'
    for element in page.locator(labels).all():
        assert element.evaluate('e => e.ariaLabel || e.labels?.length || e.textContent.trim()')


@pytest.mark.slow
def test_the_view_follows_only_a_reader_at_the_end(visit, chat):
    page = visit(chat, viewport=dict(width=400, height=400))
    change(page, max_tokens='600')
    from_end = 'view.scrollHeight - view.scrollTop - view.clientHeight'
    say(page, 'Hello')
    assert page.evaluate(from_end) < 2
    page.fill('#input', 'on')
    page.press('#input', 'Enter')
    page.locator('.assistant .text').last.filter(has_text=re.compile('[<b>]')).wait_for()
    page.evaluate('view.scrollTop = 0')
    whole(page)
    assert page.evaluate('view.scrollTop') == 0


@pytest.mark.slow
def test_the_completers_page(visit, completer):
    page = visit(completer)
    expect(page.locator('#input')).to_be_hidden()
    change(page, max_tokens='30')
    page.fill('#text', 'Once <b>')
    page.press('#text', 'Control+Enter')
    whole(page)
    text, marked = page.input_value('#text'), page.locator('mark')
    assert re.fullmatch('Once <b>[xyz]{30}', text)
    expect(marked).to_have_text(text[8:])
    expect(page.locator('#note')).to_have_text(re.compile('^30 tokens · '))
    page.click('text=Retry')
    whole(page)
    again = page.input_value('#text')
    assert re.fullmatch('Once <b>[xyz]{30}', again) and again != text
    page.press('#text', 'Control+Home')
    page.keyboard.type('More: ')
    assert marked.text_content() == again[8:]  # what the model wrote has moved
    page.press('#text', 'Control+End')
    page.keyboard.type(' and')
    expect(page.locator('#retry')).to_be_hidden()
    page.click('text=Continue')
    whole(page)
    assert re.fullmatch('More: Once <b>[xyz]{30} and[xyz]{30}', page.input_value('#text'))
    assert [len(part) for part in marked.all_text_contents()] == [30, 30]
    before = page.input_value('#text')
    page.reload()
    expect(page.locator('#text')).to_have_value(before)
    assert marked.count() == 2
    change(page, max_tokens='3000')
    page.click('text=Continue')
    expect(marked).to_have_count(3)
    page.keyboard.press('Escape')
    whole(page)
    assert len(page.input_value('#text')) < 3000


@pytest.mark.slow
def test_a_mistake_is_said_in_place(visit, chat):
    page = visit(chat)
    change(page, max_tokens='4', temperature='-1')
    say(page, 'Hello')
    expect(page.locator('.assistant .error')).to_contain_text('temperature')
    change(page, temperature='1')
    page.click('text=Retry')
    whole(page)
    expect(page.locator('.error:visible')).to_have_count(0)
    assert len(replies(page)[0]) == 4


@pytest.mark.slow
def test_a_conversation_outgrows_the_context(visit, chat):
    page = visit(chat)
    change(page, max_tokens='3', system='Be kind.')
    for letter in 'pqr':
        say(page, letter * 1500)
    assert [len(reply) for reply in replies(page)] == [3, 3, 3]
    note = page.locator('.foot span').last
    expect(note).to_have_text(re.compile('without the oldest 2 messages$'))
    say(page, 's' * 5000)
    expect(page.locator('.assistant .error')).to_contain_text('4,096')  # one that never fits


@pytest.mark.slow
def test_a_server_that_is_gone_loses_nothing(visit, folder):
    with serving(folder, 'out-chat') as (process, address):
        page = visit(address)
        change(page, max_tokens='4000')
        page.fill('#input', 'Hello')
        page.press('#input', 'Enter')
        expect(page.locator('.assistant .text')).to_have_text(re.compile('[<b>]{20}'))
        page.fill('#input', 'typed meanwhile')
    whole(page)
    expect(page.locator('.assistant .error')).to_contain_text('broke off')
    came = replies(page)
    assert len(came[0]) >= 20
    page.click('text=Retry')
    whole(page)
    expect(page.locator('.assistant .error')).to_contain_text('does not answer')
    assert replies(page) == came
    expect(page.locator('#input')).to_have_value('typed meanwhile')
    page.press('#input', 'Enter')
    whole(page)
    assert page.locator('.user .text').all_text_contents() == ['Hello', 'typed meanwhile']


@pytest.mark.slow
def test_the_servers_key_is_asked_for(browser, folder):
    with serving(folder, 'out-chat', '--api_key=secret') as (_, address):
        page = browser.new_context().new_page()
        page.goto(address)
        page.fill('#key', 'wrong')
        page.keyboard.press('Enter')
        page.locator('#key-dialog[open]').wait_for()
        page.fill('#key', 'secret')
        page.keyboard.press('Enter')
        expect(page.locator('#name')).to_have_text(re.compile('out-'))
        page.reload()
        expect(page.locator('#name')).to_have_text(re.compile('out-'))
        expect(page.locator('#key-dialog')).to_be_hidden()
