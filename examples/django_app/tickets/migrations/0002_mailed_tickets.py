from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("tickets", "0001_shows_and_tickets")]
    operations = [
        migrations.AddField(
            model_name="ticket", name="mailed", field=models.BooleanField(default=False)
        ),
    ]
