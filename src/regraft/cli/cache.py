"""`regraft cache`: list or clear the features that are kept between runs."""

from typing import Annotated, Any

from typer import Option, Typer

from regraft.cli.output import guarded, say, say_json, say_table

cache = Typer(
    help="List or clear what is cached between runs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@cache.command("list")
@guarded
def list_entries(as_json: Annotated[bool, Option("--json", help="Print the list as JSON.")] = False) -> None:
    """List the cache entries, the least recently used first.

    Example: regraft cache list
    """
    from regraft.frontier.cache.store import Store

    store = Store()
    entries = store.entries()
    total = sum(entry.bytes for entry in entries)
    if as_json:
        rows: list[dict[str, Any]] = [
            {"key": entry.key, "bytes": entry.bytes, "used": entry.used_at, "holds": entry.holds} for entry in entries
        ]
        say_json({"folder": str(store.folder), "limit_bytes": store.limit_bytes, "bytes": total, "entries": rows})
        return
    if entries:
        head = ("key", "MiB", "last used", "what")
        rows_of_text = [
            (entry.key[:12], f"{entry.bytes / 2**20:.1f}", f"{entry.used_at:%Y-%m-%d %H:%M}", entry.holds)
            for entry in entries
        ]
        say_table(head, rows_of_text, (False, True, False, False))
    share = f"{total / 2**20:.1f} MiB of {store.limit_bytes / 2**30:.0f} GiB"
    say(f"{len(entries)} entries, {share}, in {store.folder} (REGRAFT_CACHE names another)")


@cache.command("clear")
@guarded
def clear(as_json: Annotated[bool, Option("--json", help="Print the freed bytes as JSON.")] = False) -> None:
    """Delete all cache entries; the next run computes them again.

    Example: regraft cache clear
    """
    from regraft.frontier.cache.store import Store

    store = Store()
    size = store.clear()
    if as_json:
        say_json({"folder": str(store.folder), "bytes": size})
    else:
        say(f"freed {size / 2**20:.1f} MiB in {store.folder}")
