"""Finds, checks and builds plugins."""

import importlib.metadata
import inspect
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, get_args

import msgspec
from msgspec import Struct
from pluggy import PluginManager, PluginValidationError

import serfd
from serfd.agent import Agent
from serfd.config import Config, Seconds, parse_duration
from serfd.errors import ConfigError
from serfd.hooks import specs
from serfd.hooks.plugin_agent import PluginAgent
from serfd.hooks.specs import HOOKS, PROJECT

ENTRY_POINTS = "serfd.plugins"
"""The entry point group an installed package offers plugins in."""

SCRIPT_PLUGIN = "script"
"""The plugin that Serf's `event_handlers` switch on."""

HOST_KEYS = ("plugin", "durable", "hook_timeout")
"""Keys of a plugin's table that serfd takes: its file, whether its mailbox is kept, its limit."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_SECRET = re.compile(r"token|secret|passw|key|auth", re.IGNORECASE)
_MARK = f"{PROJECT}_impl"

log = logging.getLogger(__name__)

T = TypeVar("T")


class Hook(NamedTuple):
    """A plugin's implementation of a hook."""

    function: Callable[..., object]
    arguments: tuple[str, ...]
    """Those it takes, of the ones serfd passes."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedPlugin:
    """A plugin that was built and not started yet; the same object for as long as it is kept."""

    name: str
    source: str
    """Where it came from: a file, or an installed package with its version."""
    digest: str
    """Of the file's content; empty for an installed package."""
    table: Mapping[str, Any]
    """Its settings as they stand in the configuration."""
    settings: Struct | None
    """The same with types; None for a plugin without."""
    durable: bool
    """Whether what waits for it outlives the daemon."""
    hook_timeout: Seconds | None
    """How long a hook of it may take; None: as long as any plugin's."""
    agent: PluginAgent
    """What it sees of the node."""
    plugin: object
    hooks: Mapping[str, Hook] = field(repr=False)
    """Its implementation of each hook it has."""
    module: ModuleType | None = field(repr=False)
    """What its file was imported as; None for an installed package."""

    def forget(self) -> None:
        """Let go of the imported file; called when the plugin was replaced and has stopped."""
        if self.module is not None and sys.modules.get(self.module.__name__) is self.module:
            del sys.modules[self.module.__name__]


def load(
    config: Config,
    agent: Agent,
    *,
    held: Sequence[LoadedPlugin] = (),
    bundled: Path | None = None,
) -> list[LoadedPlugin]:
    """Every plugin the configuration switches on, in its order.

    A plugin of `held` whose file and settings are unchanged is handed back as it is; if only its
    settings are new and it has the hook `reload`, it is handed back with these. All others are
    built, or none: every file is imported and every setting checked before the first instance is
    made. `bundled` is the folder of the plugins that come with serfd.

    Raises:
        ConfigError: it names the plugin or file, what was found and what was expected.
    """
    folders = [_plugin_dir(text) for text in config.plugin_dirs]
    places = _Places(folders, bundled or bundled_dir())
    held_by_name = {plugin.name: plugin for plugin in held}
    prepared: list[LoadedPlugin | _Prepared] = []
    imported: list[tuple[str, ModuleType | None]] = []
    try:
        for name, table in _tables(config).items():
            own, host_keys = _host_keys(name, table)
            if host_keys.durable and _state_root(config) is None:
                raise ConfigError(
                    f"key 'durable' in [plugins.{name}] needs a place for its file: set state_dir"
                )
            found = places.find(name, host_keys.plugin)
            kept = held_by_name.get(name)
            if kept is not None and (
                kept.source, kept.digest, kept.durable, kept.hook_timeout,
            ) == (
                found.source, found.digest, host_keys.durable, host_keys.hook_timeout,
            ):  # fmt: skip
                if kept.table == own:
                    prepared.append(kept)
                    continue
                if "reload" in kept.hooks:
                    settings = _settings(name, type(kept.plugin), own)
                    prepared.append(replace(kept, table=own, settings=settings))
                    continue
            module_name = found.module_name
            if module_name:
                imported.append((module_name, sys.modules.get(module_name)))
            prepared.append(_prepare(found, own, host_keys))
        return [
            p if isinstance(p, LoadedPlugin) else _build(p, agent, _state_root(config))
            for p in prepared
        ]
    except ConfigError:
        for module_name, before in imported:
            sys.modules.pop(module_name, None)
            if before is not None:
                sys.modules[module_name] = before
        raise


def implementations(plugins: Iterable[LoadedPlugin], hook: str) -> list[LoadedPlugin]:
    """Those of `plugins` that implement `hook`, in their order but for `tryfirst` and `trylast`."""
    by_name = {plugin.name: plugin for plugin in plugins}
    manager = _manager()
    # pluggy calls the last one registered first.
    for name, plugin in reversed(by_name.items()):
        manager.register(plugin.plugin, name)
    return [by_name[i.plugin_name] for i in reversed(getattr(manager.hook, hook).get_hookimpls())]


def bundled_dir() -> Path:
    """The folder of the plugins that come with serfd: in an installed wheel, or in its source."""
    package = Path(serfd.__file__).parent
    installed = package / "bundled_plugins"
    return installed if installed.is_dir() else package.parent / "plugins"


# Where a plugin is


@dataclass(frozen=True, slots=True)
class _File:
    """A plugin's file as it was read."""

    name: str
    """In the configuration; several may have the same file."""
    source: str
    path: Path
    content: bytes

    @property
    def digest(self) -> str:
        # Compared within this process only. Loading hashlib costs 3 MB, for OpenSSL.
        return f"{hash((self.path, self.content)) & 0xFFFFFFFFFFFFFFFF:016x}"

    @property
    def module_name(self) -> str:
        """Old and new code never mix: other content is another module."""
        return f"serfd_plugin_{self.path.stem.replace('-', '_')}_{self.digest[:16]}"

    def load(self) -> tuple[type, ModuleType]:
        """Run the file, once for all that have it; gives its class `Plugin`."""
        loaded = sys.modules.get(self.module_name)
        if loaded is not None:
            return _plugin_class(loaded, str(self.path)), loaded
        module = ModuleType(self.module_name)
        module.__file__ = str(self.path)
        # Where `typing` looks for the names in annotations, and pickle for classes.
        sys.modules[self.module_name] = module

        def run() -> None:
            # What was hashed is what runs, even if the file is being replaced just now.
            exec(compile(self.content, self.path, "exec"), module.__dict__)

        _run_foreign(run, f"plugin {self.name!r} cannot be imported", self.path)
        return _plugin_class(module, str(self.path)), module


@dataclass(frozen=True, slots=True)
class _Installed:
    """An entry point of an installed package. Its code is imported once per process."""

    name: str
    entry_point: importlib.metadata.EntryPoint

    digest = ""
    module_name = ""

    @property
    def source(self) -> str:
        """The package, its version, and where in it."""
        package = self.entry_point.dist
        title = f"{package.name} {package.version}, " if package is not None else ""
        return f"{title}{self.entry_point.value} (installed package)"

    def load(self) -> tuple[type, None]:
        """Import the package; gives its class."""
        found = _run_foreign(
            self.entry_point.load, f"plugin {self.name!r} cannot be imported", None
        )
        if isinstance(found, ModuleType):
            found = _plugin_class(found, self.source)
        if not isinstance(found, type):
            raise ConfigError(f"{self.source}: expected a class, found {found!r}")
        return found, None


class _Places:
    """Where plugins are looked for."""

    def __init__(self, folders: Sequence[Path], bundled: Path) -> None:
        self._folders = folders
        self._bundled = bundled

    def find(self, name: str, file: str) -> _File | _Installed:
        """The directories of `plugin_dirs`, then installed packages, then what comes with serfd.

        `file`: the plugin's name in those places, without `.py`.
        """
        for text in {name: None, file: None}:
            if not _NAME.fullmatch(text):
                raise ConfigError(
                    f"[plugins.{name}]: {text!r} is not a plugin's name, expected letters, digits, "
                    "'_' and '-'"
                )
        for folder in self._folders:
            if (path := folder / f"{file}.py").is_file():
                return _read(name, path, "plugin_dirs")
        installed = importlib.metadata.entry_points(group=ENTRY_POINTS, name=file)
        if len(installed) > 1:
            both = " and ".join(sorted(_Installed(name, each).source for each in installed))
            raise ConfigError(f"plugin {file!r} is offered twice: by {both}")
        for entry_point in installed:
            return _Installed(name, entry_point)
        if (path := self._bundled / f"{file}.py").is_file():
            return _read(name, path, "comes with serfd")
        where = [*map(str, self._folders), "installed packages", str(self._bundled)]
        raise ConfigError(
            f"plugin {file!r}, switched on by [plugins.{name}], was not found; looked in "
            f"{', '.join(where)}{_hint(file, self._names())}"
        )

    def _names(self) -> list[str]:
        names = {path.stem for folder in (*self._folders, self._bundled)
                 for path in folder.glob("*.py")}  # fmt: skip
        names |= {e.name for e in importlib.metadata.entry_points(group=ENTRY_POINTS)}
        return sorted(names)


def _plugin_dir(text: str) -> Path:
    if not Path(text).is_dir():
        raise ConfigError(f"plugin_dirs: {text!r} is not a directory")
    return Path(text)


def _read(name: str, path: Path, origin: str) -> _File:
    try:
        return _File(name, f"{path} ({origin})", path, path.read_bytes())
    except OSError as error:
        raise ConfigError(f"plugin {name!r}: cannot read {path}: {error.strerror}") from None


def _plugin_class(module: ModuleType, source: str) -> type:
    found = getattr(module, "Plugin", None)
    if not isinstance(found, type):
        raise ConfigError(f"{source}: there is no class named Plugin")
    return found


# What it must be like


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All that can be checked is checked."""

    found: _File | _Installed
    table: Mapping[str, Any]
    host_keys: "_HostKeys"
    make: type
    settings: Struct | None
    module: ModuleType | None


def _tables(config: Config) -> dict[str, dict[str, Any]]:
    """Each plugin's settings. Serf's `event_handlers` are settings of the plugin `script`."""
    if not config.event_handlers:
        return config.plugins
    own = config.plugins.get(SCRIPT_PLUGIN, {})
    more = own.get("handlers", [])
    if not isinstance(more, list):
        return config.plugins  # which its settings will refuse
    script = {**own, "handlers": [*config.event_handlers, *more]}
    if SCRIPT_PLUGIN in config.plugins:
        return {**config.plugins, SCRIPT_PLUGIN: script}
    return {SCRIPT_PLUGIN: script, **config.plugins}


class _HostKeys(NamedTuple):
    """What of a plugin's table is serfd's."""

    plugin: str
    durable: bool
    hook_timeout: Seconds | None


def _host_keys(name: str, table: Mapping[str, Any]) -> tuple[dict[str, Any], _HostKeys]:
    """A plugin's own settings, and what is serfd's. Raises ConfigError."""
    own = dict(table)
    file, durable = own.pop("plugin", name), own.pop("durable", False)
    for key, value, kind in (("plugin", file, str), ("durable", durable, bool)):
        if not isinstance(value, kind):
            expected = "a plugin's name" if kind is str else "true or false"
            raise ConfigError(
                f"key {key!r} in [plugins.{name}]: found {value!r}, expected {expected}"
            )
    hook_timeout: Seconds | None = None
    if "hook_timeout" in own:
        try:
            hook_timeout = _seconds(Seconds, own.pop("hook_timeout"))
            if hook_timeout <= 0:
                raise ValueError("must be longer than 0")
        except ValueError as error:
            raise ConfigError(f"key 'hook_timeout' in [plugins.{name}]: {error}") from None
    return own, _HostKeys(file, durable, hook_timeout)


def _prepare(
    found: _File | _Installed, table: Mapping[str, Any], host_keys: _HostKeys
) -> _Prepared:
    make, module = found.load()
    _check_hooks(found.name, make)
    settings = _settings(found.name, make, table)
    given = (settings,) if settings is not None else ()
    try:
        inspect.signature(make).bind(None, *given)
    except TypeError:
        arguments = "agent, settings" if given else "agent"
        raise ConfigError(
            f"plugin {found.name!r}: __init__ must take (self, {arguments}), found "
            f"{inspect.signature(make)}"
        ) from None
    return _Prepared(found, table, host_keys, make, settings, module)


def _state_root(config: Config) -> Path | None:
    """What each plugin's directory stands in; systemd may give several, with colons between."""
    text = config.state_dir or os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return Path(text) if text else None


def _build(prepared: _Prepared, node: Agent, state_root: Path | None) -> LoadedPlugin:
    found = prepared.found
    path = found.path if isinstance(found, _File) else None
    agent = PluginAgent(node, found.name, state_root)
    given = (prepared.settings,) if prepared.settings is not None else ()
    plugin: object = _run_foreign(
        lambda: prepared.make(agent, *given),
        f"plugin {found.name!r} could not be built from [plugins.{found.name}]",
        path,
    )
    manager = _manager()
    try:
        manager.register(plugin, found.name)
        manager.check_pending()
    except PluginValidationError as error:
        raise ConfigError(f"plugin {found.name!r}: {error}") from None
    functions = {
        hook: impl.function
        for hook in HOOKS
        for impl in getattr(manager.hook, hook).get_hookimpls()
    }
    log.info("plugin %s: loaded from %s", found.name, found.source)
    return LoadedPlugin(
        name=found.name,
        source=found.source,
        digest=found.digest,
        table=prepared.table,
        settings=prepared.settings,
        durable=prepared.host_keys.durable,
        hook_timeout=prepared.host_keys.hook_timeout,
        agent=agent,
        plugin=plugin,
        hooks={
            hook: Hook(function, tuple(inspect.signature(function).parameters))
            for hook, function in functions.items()
        },
        module=prepared.module,
    )


def _manager() -> PluginManager:
    manager = PluginManager(PROJECT)
    manager.add_hookspecs(specs)
    return manager


def _check_hooks(name: str, make: type) -> None:
    """Refuse what would never be called, or not as its author thinks. Raises ConfigError."""
    implemented: dict[str, str] = {}
    for method in dir(make):
        static = inspect.getattr_static(make, method)
        function = getattr(static, "__func__", static)
        marks = getattr(static, _MARK, None) or getattr(function, _MARK, None)
        if not isinstance(marks, dict):
            if method in HOOKS and inspect.isroutine(static):
                log.warning(
                    "plugin %s: method %s has the name of a hook but no @hookimpl; it is never "
                    "called",
                    name, method,
                )  # fmt: skip
            continue
        hook = marks["specname"] or method
        place = f"plugin {name!r}: {_place(function)}"
        if not inspect.isfunction(function):
            raise ConfigError(f"{place}: {method} is marked with @hookimpl but is no method")
        if marks["wrapper"] or marks["hookwrapper"]:
            raise ConfigError(f"{place}: {method} is a hook wrapper, which serfd does not call")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigError(f"{place}: {method} contains yield, use async def and await")
        if hook not in HOOKS:
            if marks["optionalhook"]:
                continue
            raise ConfigError(
                f"{place}: there is no hook {hook!r}; the hooks are {', '.join(HOOKS)}"
                f"{_hint(hook, HOOKS)}"
            )
        if hook in implemented:
            raise ConfigError(f"{place}: {method} and {implemented[hook]} both implement {hook!r}")
        implemented[hook] = method
        parameters = list(inspect.signature(function).parameters.values())
        if not isinstance(static, staticmethod):
            if not parameters or parameters[0].name in HOOKS[hook]:
                raise ConfigError(f"{place}: {method} lacks its first argument, self")
            del parameters[0]
        for parameter in parameters:
            _check_argument(parameter, hook, place)


def _check_argument(parameter: inspect.Parameter, hook: str, place: str) -> None:
    passed = HOOKS[hook]
    if parameter.name in passed and parameter.kind in (
        parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY,
    ):  # fmt: skip
        return
    expected = f"serfd passes {', '.join(passed) if passed else 'no arguments'}"
    raise ConfigError(
        f"{place}: hook {hook!r} gets no argument '{parameter}'; {expected}"
        f"{_hint(parameter.name, passed)}"
    )


def _settings(name: str, make: type, table: Mapping[str, Any]) -> Struct | None:
    """The table as the plugin's `Settings`, if it has them. Raises ConfigError."""
    section = f"[plugins.{name}]"
    kind = getattr(make, "Settings", None)
    if kind is None:
        if table:
            key = next(iter(table))
            raise ConfigError(
                f"plugin {name!r}: takes no settings, found {key!r} in {section}"
                f"{_hint(key, HOST_KEYS)}"
            )
        return None
    if not (isinstance(kind, type) and issubclass(kind, Struct)):
        raise ConfigError(
            f"plugin {name!r}: Plugin.Settings is {kind!r}, expected a subclass of "
            "serfd.hooks.Struct"
        )
    known = kind.__struct_encode_fields__
    for key in HOST_KEYS:
        if key in known:
            raise ConfigError(f"plugin {name!r}: a setting cannot be named {key!r}, serfd has it")
    for key in table:
        if key not in known:
            raise ConfigError(
                f"plugin {name!r}: unknown key {key!r} in {section}"
                f"{_hint(key, (*known, *HOST_KEYS))}"
            )
    try:
        _check_defaults(kind)
        return msgspec.convert(table, kind, dec_hook=_seconds)
    except msgspec.ValidationError as error:
        raise ConfigError(f"plugin {name!r}: {_explain(str(error), section, table)}") from None
    except ConfigError as error:
        raise ConfigError(f"plugin {name!r}: {error}") from None
    except (TypeError, ValueError, NameError, NotImplementedError) as error:
        raise ConfigError(f"plugin {name!r}: Plugin.Settings is wrong: {error}") from None


def _check_defaults(kind: type[Struct]) -> None:
    """Refuse a text where a duration belongs: msgspec takes defaults as they are."""
    for setting in msgspec.structs.fields(kind):
        if isinstance(setting.default, str) and Seconds in (setting.type, *get_args(setting.type)):
            seconds = parse_duration(setting.default)
            raise TypeError(
                f"the default of {setting.name!r} is the text {setting.default!r}, expected "
                f"Seconds({seconds:g})"
            )


def _seconds(kind: type, value: object) -> Seconds:
    if kind is not Seconds:
        raise NotImplementedError(f"a setting cannot be of type {kind.__name__}")
    if isinstance(value, str):
        return parse_duration(value)
    raise ValueError(
        f"found {value!r}, expected a duration in quotes like '500ms', '10s', '5m' or '24h'"
    )


def _explain(text: str, section: str, table: Mapping[str, Any]) -> str:
    """What msgspec said as: key, what was expected, what was found."""
    what, _, place = text.partition(" - at `$")
    key = place.rstrip("`").lstrip(".")
    where = f"key {key!r} in {section}" if key else section
    missing = re.fullmatch(r"Object missing required field `(.*)`", what)
    if missing is not None:
        return f"missing key {missing[1]!r} in {where}"
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what)
    if unknown is not None:
        return f"unknown key {unknown[1]!r} in {where}"
    if not what.startswith("Expected"):
        return f"{where}: {what}" if key else what
    found: Any = table
    for step in re.findall(r"[^.\[\]]+", key):
        if isinstance(found, list) and step.isdigit():
            found = found[int(step)]
        elif isinstance(found, Mapping) and step in found:
            found = found[step]
        else:
            # Inside a dict msgspec writes `[...]` for the key.
            break
    shown = "a value that is not shown" if _SECRET.search(f"{key} {found!r}") else repr(found)
    return f"{where}: {what[0].lower()}{what[1:]}, found {shown}"


# Words for errors


def _run_foreign(call: Callable[[], T], what: str, path: Path | None) -> T:
    """Run a plugin's own code. Raises ConfigError with `what`, the file, line and exception."""
    try:
        return call()
    except ConfigError as error:
        # Written for the operator, to whom the place in the code says nothing.
        raise ConfigError(f"{what}: {error}") from error
    # SystemExit: a file that calls sys.exit() must not end a running daemon at its reload.
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if path is None or frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename:
            place = f"{error.filename}:{error.lineno}"
        else:
            place = f"{own[-1].filename}:{own[-1].lineno}" if own else "before its first line"
        raise ConfigError(f"{what}: {place}: {type(error).__name__}: {error}") from error


def _place(function: Any) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def _hint(found: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches  # only a mistake needs it

    near = get_close_matches(found, list(known), 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
