"""`docs/settings.md` is what the code generates."""

from worker import settings_page
from worker.settings import Settings, environment_name


def test_the_page_is_up_to_date() -> None:
    assert settings_page.main(["--check"]) == 0, f"run `{settings_page.COMMAND}`"


def test_the_page_describes_every_setting_with_its_default_and_its_range() -> None:
    lines = settings_page.page().splitlines()
    for name, field in Settings.model_fields.items():
        [row] = [line for line in lines if line.startswith(f"| `{environment_name(name)}` |")]
        assert str(field.description).replace("|", r"\|") in row
        assert field.default in (None, (), {}, "") or f"| `{field.default}` |" in row
    assert any("TWEETSCORE_CACHE_MB" in line and "| whole number, 1 to 100,000,000 |" in line for line in lines)
    assert any("TWEETSCORE_GRACE_SECONDS" in line and "more than 0, at most 3,600" in line for line in lines)


def test_every_group_begins_at_a_setting() -> None:
    assert set(settings_page.GROUPS) <= set(Settings.model_fields)
    assert next(iter(Settings.model_fields)) in settings_page.GROUPS
