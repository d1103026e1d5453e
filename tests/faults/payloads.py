"""Chat templates that try to get out: what the field's advisories and the payload collections have tried so far.

`COMMAND` stands for a shell command that writes the canary file, `PATH` for that file. They are known ways, written
down once: a list of sources, no code of luthier.
"""

from __future__ import annotations

ATTRIBUTES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__.__subclasses__()[120].__init__.__globals__['os'].system('COMMAND') }}",
    "{{ [].__class__.__base__.__subclasses__() }}",
    "{{ {}.__class__.__bases__[0].__subclasses__() }}",
    "{{ (1).__class__.__mro__ }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ messages.__init__.__globals__['os'].system('COMMAND') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('COMMAND') }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.popen('COMMAND').read() }}",
    "{{ self._TemplateReference__context.joiner.__init__.__globals__.os.popen('COMMAND').read() }}",
    "{{ self._TemplateReference__context.namespace.__init__.__globals__.os.popen('COMMAND').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('COMMAND').read() }}",
    "{{ joiner.__init__.__globals__.os.popen('COMMAND').read() }}",
    "{{ namespace.__init__.__globals__.os.popen('COMMAND').read() }}",
    "{{ lipsum.__globals__['os'].popen('COMMAND').read() }}",
    "{{ lipsum.__globals__.os.system('COMMAND') }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ dict.mro()[-1].__subclasses__() }}",
    "{{ range.__class__.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('PATH', 'w').write('x') }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ raise_exception.__globals__.os.system('COMMAND') }}",
    "{{ strftime_now.__self__.__class__.__mro__ }}",
    "{{ strftime_now.__self__.__reduce__() }}",
    "{{ strftime_now.__self__.tzinfo.__class__.__init__ }}",
    "{{ loop.__class__ }}{% for a in [1] %}{{ loop.__init__.__globals__.os.system('COMMAND') }}{% endfor %}",
    "{% for a in [1] %}{{ loop._iterator.__class__ }}{{ loop._undefined }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__.os.system('COMMAND') }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__.os.system('COMMAND') }}",
    "{% macro m() %}{% endmacro %}{{ m._environment.globals }}",
    "{% macro m() %}{{ caller._environment }}{% endmacro %}{% call m() %}{% endcall %}",
    "{{ undefined_name.__class__.__init__.__globals__.os.system('COMMAND') }}",
    "{{ undefined_name.__init__.__globals__.sys.modules.os.system('COMMAND') }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{{ messages | map(attribute='role.__class__.__mro__') | list }}",
    "{{ messages | groupby('__class__') }}{{ messages | sort(attribute='__class__') }}",
    "{{ messages | selectattr('__class__') | list }}",
    "{{ messages | sum(attribute='__class__') }}",
)
FILTERS = (
    "{{ '' | attr('__class__') }}",
    "{{ '' | attr('__class__') | attr('__mro__') | attr('__getitem__')(1) | attr('__subclasses__')() }}",
    "{{ '' | attr('\\x5f\\x5fclass\\x5f\\x5f') | attr('\\x5f\\x5fbase\\x5f\\x5f') }}",
    "{{ '' | attr(['_' * 2, 'class', '_' * 2] | join) }}",
    "{{ '' | attr('__cla' ~ 'ss__') }}",
    "{{ cycler | attr('__init__') | attr('__globals__') | attr('__getitem__')('os') | attr('popen')('COMMAND') }}",
    "{{ (cycler | attr('__init__'))['__globals__'] }}",
    "{{ ''['__class__'] }}{{ messages['__class__'] }}",
    "{{ ''['__cla' + 'ss__']['__mro__'][1]['__subclasses__']() }}",
    "{{ [''] | map('attr', '__class__') | list }}",
    "{{ [''] | map('attr', '__class__') | map('attr', '__mro__') | list }}",
    "{{ messages | map('format', messages) | list }}",
    "{{ [1] | map('tojson') | first | attr('format') }}",
    "{{ [raise_exception] | map(attribute='__globals__') | first }}",
    "{{ [cycler] | map(attribute='__init__.__globals__.os') | list }}",
    "{{ 'COMMAND' | xmlattr }}{{ {'a b': 'COMMAND'} | xmlattr }}",
)
FORMATS = (
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{a.__class__.__init__.__globals__}'.format(a=cycler) }}",
    "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "{{ ('{0.__class__.__base__}' | attr('format'))('') }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
    "{{ ['{0.__class__}'.format][0]('') }}",
    "{{ [''] | map('{0.__class__}'.format) | list }}",
    "{{ ('{0.__class__}' | escape).format('') }}",
    "{{ ('{0.__class__.__mro__}' | safe).format_map({'0': ''}) }}",
    "{{ 'a'.replace('a', '{0.__class__}').format('') }}",
    "{{ '%s' % ''.__class__ }}{{ '%(a)s' % {'a': ''.__class__.__mro__} }}",
    "{{ '{}'.join.__class__ }}{{ ''.join.__self__.__class__ }}",
    "{% set a = '{0.__class__.__init__.__globals__}' %}{{ a.format(joiner) }}{{ (a ~ '').format(namespace) }}",
)
STATEMENTS = (
    "{% include 'PATH' %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('COMMAND') }}",
    "{% import 'PATH' as x %}{{ x }}",
    "{% from 'os' import system %}{{ system('COMMAND') }}",
    "{% extends 'PATH' %}",
    "{% extends '/etc/passwd' %}{% block a %}{% endblock %}",
    "{% from config import x %}{{ config.items() }}{{ config.__class__ }}",
    "{{ get_flashed_messages.__globals__ }}{{ url_for.__globals__.os.system('COMMAND') }}{{ request.application }}",
    "{{ __import__('os').system('COMMAND') }}",
    "{{ exec('COMMAND') }}{{ eval('1') }}{{ open('PATH', 'w') }}",
    "{% set x = messages.append %}{{ x(1) }}",
    "{% set _ = messages[0].update({'role': 'system'}) %}{{ messages[0].role }}",
    "{% set _ = messages.clear() %}{{ messages }}",
    "{% set _ = [1, 2].__setitem__(0, 3) %}{{ _ }}",
    "{{ environment.globals }}{{ environment.__class__ }}{{ context.parent }}",
    "{{ resolve('os') }}{{ missing.__class__ }}{{ undefined.__class__ }}{{ t_1 }}{{ l_0_messages }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    "{% set ns = namespace(a=1) %}{{ ns._Namespace__attrs.__class__.__mro__ }}",
    "{{ loop.cycle.__globals__ }}{{ caller.__globals__ }}{{ super.__self__ }}{{ varargs.__class__ }}",
    "{% autoescape true %}{{ ''.__class__ }}{% endautoescape %}",
    "{% do messages.append(1) %}",
    "{{ ''.encode('rot13') }}{{ ''.encode('__class__') }}{{ b }}",
    "{{ ''.encode().__class__ }}{{ 'a'.encode('idna').decode.__self__ }}",
    "{{ ''.translate.__self__.__class__ }}{{ ''.maketrans.__self__.__mro__ }}",
    "{% generation %}{{ ''.__class__ }}{% endgeneration %}",
    "{% trans %}{{ ''.__class__ }}{% endtrans %}",
    "{% debug %}",
    "# line statement\n## comment\n{{ ''.__class__.__mro__ }}",
    "{{ gi_frame }}{{ (messages | map('upper')).gi_frame.f_globals }}",
    "{{ (messages | map('upper')).gi_frame.f_back.f_back.f_globals['os'].system('COMMAND') }}",
    "{{ (messages | select).gi_code.co_filename }}",
    "{{ ''.__doc__ }}{{ ''.__reduce_ex__(2) }}{{ ''.__getattribute__('__class__') }}",
    "{{ 1 .__add__.__self__.__class__ }}{{ true.__class__.__mro__[-1] }}{{ none.__class__ }}",
)
TEMPLATES = (*ATTRIBUTES, *FILTERS, *FORMATS, *STATEMENTS)

BOMBS = {
    "a long text": "{{ 'a' * 10 ** 8 }}",
    "a huge number": "{{ 9 ** 999999999 }}",
    "a shifted number": "{{ (2 ** 60000) * (2 ** 60000) ** 60 }}",
    "a wide field": "{{ '%0999999999d' % 1 }}",
    "a wide format": "{{ '{:>999999999}'.format(1) }}",
    "a filter's width": "{{ 'a' | center(999999999) }}",
    "an indentation": "{{ ('a\n' * 1000) | indent(999999) }}",
    "a doubled text": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a doubled list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a joined list": (
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}"
    ),
    "a replaced text": (
        "{% set n = namespace(x='a') %}{% for i in range(9) %}{% set n.x = n.x.replace('a', 'a' * 999) %}{% endfor %}"
    ),
    "a nested list": (
        "{% set n = namespace(x=[1]) %}{% for i in range(99999) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
        "{{ n.x | string }}"
    ),
    "a list of ranges": "{{ range(99999) | map('string') | map('center', 9999) | list | length }}",
    "a product": "{% set l = range(99999) | list %}{{ l * 99999 }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop of sorts": "{% for i in range(99999) %}{% set x = range(99999) | list | sort(reverse=true) %}{% endfor %}",
    "a loop in C": "{{ range(99999) | batch(1) | map('list') | map('join') | sort | unique | list | length * 0 }}"
    "{% for i in range(999) %}{{ (range(99999) | sum) * 0 }}{% endfor %}",
    "a recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a wide recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a recursive loop": "{% for a in [[[]]] recursive %}{{ loop([a]) }}{% endfor %}",
    "a huge range": "{{ range(10 ** 12) | list }}",
    "many words": "{{ 'a ' * 999999 | wordcount }}{{ ('a ' * 999999) | title | wordwrap(1) | length }}"
    "{{ ('a ' * 999999) | wordwrap(1) }}{{ ('a ' * 999999) | wordwrap(1) }}",
    "a long output": "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "deep brackets": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "deep blocks": "{% if a %}" * 5000 + "{% endif %}" * 5000,
    "deep lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "long sums": "{{ " + "1+" * 60000 + "1 }}",
    "many names": "".join(f"{{% set a{number} = {number} %}}" for number in range(30000)),
    "a constant": "{{ " + "'a' ~ " * 20000 + "'a' }}" + "{% set x = 'a' * 4000000 %}" * 9,
}
"""Templates that use up memory or time when they are compiled or rendered. Some only make a harmless text."""

SWIFT = (
    "a long text", "a huge number", "a wide field", "a filter's width", "a doubled text", "a doubled list",
    "a nested list", "a product", "nested loops", "a recursion", "a huge range", "a long output", "deep brackets",
    "long sums",
)  # fmt: skip
"""The bombs that a quick test tries; the others are of the same kinds."""
LIMITED = (
    "a long text", "a huge number", "a wide field", "a filter's width", "a doubled text", "a doubled list",
    "a product", "nested loops", "a long output", "a loop of sorts", "a wide recursion", "a loop in C",
)  # fmt: skip
"""Those that can only end at a limit of luthier, and so name it."""
