"""The example models and data of suture; `suture.zoo` reads them."""
