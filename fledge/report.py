"""What evaluate.py measured, for people: a table with a column for each model, and pictures.

compare.py has its columns and its picture from here, too.
"""

import os

from fledge import UserError, replacing


def folder_of_pictures(path: str) -> str:
    """Beside the weights at path, or here where nothing can be written there."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) or '.'
    return folder if os.path.isdir(folder) and os.access(folder, os.W_OK) else '.'


def rows_of(result: dict, name: str = '') -> dict[str, str]:
    """A result's numbers as a person reads them: {label: text}; of groups the accuracy alone."""
    rows = {}
    for key, value in result.items():
        label = f'{name} {key}'.strip()
        if key == 'groups':
            for group, of_group in value.items():
                rows[f'{name} / {group}'] = rows_of(of_group)['accuracy']
        elif isinstance(value, dict):
            rows |= rows_of(value, '' if key == 'tasks' else label)
        elif isinstance(value, int):
            rows[label] = f'{value:,}'
        elif isinstance(value, float):
            rows[label] = f'{value:.4g}'
            if result.get(f'{key}_interval'):
                low, high = result[f'{key}_interval']
                rows[label] += f' ({low:.4g} to {high:.4g})'
    return rows


def table(results: dict[str, dict]) -> str:
    """Results side by side, as lines of text. results: {model: what was measured}."""
    columns = [rows_of(result) for result in results.values()]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    lines = [['', *results]]
    for label in labels:
        lines.append([label, *(column.get(label, '') for column in columns)])
    return aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells as columns of text: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for label, *cells in lines:
        row = label.ljust(widths[0])
        for cell, width in zip(cells, widths[1:], strict=True):
            row += f'  {cell:>{width}}'
        text.append(row)
    return '\n'.join(text)


def draw_loss_by_position(results: dict[str, dict], path: str) -> None:
    """Draw the loss by position of each model as a PNG at path. results: see table."""
    axes = new_axes((7, 4.5))
    for model, result in results.items():
        read = [(part['first'] + part['last']) / 2 for part in result['loss_by_position']]
        losses = [part['loss'] for part in result['loss_by_position']]
        axes.plot(read, losses, marker='o', label=model)
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:g}')
    axes.set(xlabel='tokens that a prediction is made from', ylabel='loss (nats a token)')
    axes.grid(alpha=0.3)
    axes.legend()
    save(axes.figure, path)


def draw_tasks(results: dict[str, dict], path: str) -> None:
    """Draw the accuracy of each model in each task and group, with 95% intervals, as a PNG."""
    axes, height = new_axes(), 0.8 / len(results)
    for number, (model, result) in enumerate(results.items()):
        labels, bars = [], []
        for task, of_task in result['tasks'].items():
            folder, name = os.path.split(task)
            labels.append(os.path.join(os.path.basename(folder), name))
            bars.append(of_task)
            for group, of_group in of_task['groups'].items():  # two tasks may have the same
                labels.append(f'  {group}')
                bars.append(of_group)
        shares = [bar['accuracy'] for bar in bars]
        intervals = [bar['accuracy_interval'] for bar in bars]
        below = [share - low for share, (low, _) in zip(shares, intervals, strict=True)]
        above = [high - share for share, (_, high) in zip(shares, intervals, strict=True)]
        places = [i + number * height for i in range(len(bars))]
        axes.barh(places, shares, height, xerr=[below, above], label=model, capsize=2)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(labels))], labels)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel='accuracy, with its 95% interval')
    axes.grid(axis='x', alpha=0.3)
    axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1))
    axes.figure.set_size_inches(8, 1.5 + len(labels) * (0.2 + 0.2 * len(results)))
    save(axes.figure, path)


def new_axes(size: tuple[float, float] | None = None, **grid) -> object:
    """Axes in a figure of their own; size: (width, height) in inches; grid: see Figure.subplots."""
    from matplotlib.figure import Figure  # without pyplot: faster to import, and never a window

    return Figure(figsize=size).subplots(**grid)


def save(figure: object, path: str) -> None:
    """Write a figure as a PNG, and print where it is; UserError where that cannot be."""
    try:
        with replacing(path, 'wb') as f:
            figure.savefig(f, format='png', dpi=120, bbox_inches='tight')
    except OSError as e:
        raise UserError(f'cannot write {path}: {e.strerror}') from None
    print(f'{path} shows it')
