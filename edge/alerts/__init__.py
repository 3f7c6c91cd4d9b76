"""From events to MQTT, through a durable outbox."""
