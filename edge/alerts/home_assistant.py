"""What Home Assistant needs to know to show a box: the retained configs of its MQTT discovery. Sends nothing.

Format: https://www.home-assistant.io/integrations/mqtt/#mqtt-discovery (one component per topic, no abbreviations).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge.alerts.settings import HomeAssistantSettings
    from edge.alerts.topics import Identity

BIRTH = b"online"
# Home Assistant's word for "not known", for a binary sensor and for a sensor alike.
_UNKNOWN = "None"
_PROBLEM = (
    "{{ 'ON' if value_json.state == 'nok' else 'OFF' if value_json.state == 'ok' else '" + _UNKNOWN + "' }}"
)  # fmt: skip
# Our availability has a third word, stopped; Home Assistant overlooks words that it was not told of.
_ONLINE = "{{ 'online' if value == 'online' else 'offline' }}"
_SLUG = re.compile(r"[^a-zA-Z0-9_-]+")


class HomeAssistant:
    """The discovery configs of one box and its cameras and stations.

    Args:
        settings: of the section ``home_assistant``.
        identity: the box.
    """

    def __init__(self, settings: HomeAssistantSettings, identity: Identity) -> None:
        self._prefix = settings.prefix
        self._identity = identity
        self.node = _object_id(f"lineward_{identity.site}_{identity.box}", identity.root)
        """The level of a discovery topic that names the box, for access lists."""

    @property
    def status_topic(self) -> str:
        """Where Home Assistant says that it has started (:data:`BIRTH`) and wants everything again."""
        return f"{self._prefix}/status"

    def box_configs(self) -> dict[str, bytes]:
        """Topic -> retained payload of the box itself: whether it can be reached."""
        config = {
            "name": "Connection",
            "unique_id": f"{self.node}_connection",
            "state_topic": self._identity.available,
            "value_template": "{{ 'ON' if value == 'online' else 'OFF' }}",
            "device_class": "connectivity",
            "entity_category": "diagnostic",
            "device": self._device(),
            "origin": _origin(),
        }
        return {self._topic("binary_sensor", "connection"): _encode(config)}

    def configs(self, name: str) -> dict[str, bytes]:
        """Topic -> retained payload of a camera or station: problem, score and state.

        Args:
            name: as it stands in the topics.
        """
        thing = _object_id(name, name)
        entities: list[tuple[str, str, str, dict[str, Any]]] = [
            ("binary_sensor", "problem", "Defect", {"device_class": "problem", "value_template": _PROBLEM}),
            ("sensor", "score", "Score", {"state_class": "measurement", "value_template": "{{ value_json.score }}"}),
            (
                "sensor",
                "state",
                "State",
                {
                    "device_class": "enum",
                    "options": ["ok", "nok", "not_judged"],
                    "value_template": "{{ value_json.state }}",
                },
            ),
        ]
        found = {}
        for component, what, label, own in entities:
            config = {
                "name": label,
                "unique_id": f"{self.node}_{thing}_{what}",
                "state_topic": self._identity.state(name),
                "availability": [{"topic": self._identity.available, "value_template": _ONLINE}],
                "device": self._device(name, thing),
                "origin": _origin(),
                **own,
            }
            if what == "state":
                config["json_attributes_topic"] = self._identity.state(name)
            found[self._topic(component, f"{thing}_{what}")] = _encode(config)
        return found

    def _topic(self, component: str, object_id: str) -> str:
        return f"{self._prefix}/{component}/{self.node}/{object_id}/config"

    def _device(self, name: str = "", thing: str = "") -> dict[str, Any]:
        identity = self._identity
        common = {
            "manufacturer": "Lineward",
            "sw_version": _version(),
            "suggested_area": identity.site,
        }
        if not name:
            return {"identifiers": [self.node], "name": f"{identity.site} {identity.box}", "model": "box", **common}
        return {
            "identifiers": [f"{self.node}_{thing}"],
            "name": f"{identity.site} {identity.box} {name}",
            "model": "camera",
            "via_device": self.node,
            **common,
        }


def _object_id(text: str, unique: str) -> str:
    """``[a-zA-Z0-9_-]+``, as discovery demands; names that differ in other characters only stay apart by the digest."""
    digest = hashlib.sha256(unique.encode()).hexdigest()[:8]
    slug = _SLUG.sub("_", text)[:80].strip("_")
    return f"{slug}_{digest}" if slug else digest


def _origin() -> dict[str, str]:
    return {"name": "lineward", "sw_version": _version()}


def _version() -> str:
    return importlib.metadata.version("lineward")


def _encode(config: dict[str, Any]) -> bytes:
    return json.dumps(config, ensure_ascii=False, separators=(",", ":")).encode()
