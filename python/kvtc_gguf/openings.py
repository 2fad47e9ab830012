"""Openings of the texts that a model samples for its calibration: beginnings in many languages, and questions to it.

From BOS alone a model mostly writes what it saw most of, in one language and no chat. Written for this project.
"""

from __future__ import annotations

BEGINNINGS = (
    "Am nächsten Morgen war der Fluss so weit gestiegen, dass die untere Brücke gesperrt werden musste. Die "
    "Gemeinde bat alle Anwohner, ihre Keller zu räumen und die Fahrzeuge auf den Parkplatz der Schule zu "
    "stellen. Wie lange das Hochwasser bleiben würde, konnte niemand sagen; das Amt für Umwelt rechnete mit "
    "zwei bis drei Tagen.",
    "Le programme lit d'abord son fichier de configuration, puis il vérifie que tous les répertoires nommés "
    "existent. Si l'un d'eux manque, un message est affiché et l'exécution s'arrête sans rien modifier. "
    "L'option « --force » permet de remplacer des fichiers déjà présents ; elle doit être employée avec "
    "prudence, car aucune copie n'est conservée.",
    "La empresa anunció ayer que abrirá dos nuevas plantas en el norte del país antes de que termine el año. "
    "Según su directora, los trabajadores recibirán formación durante seis meses y podrán elegir entre "
    "varios turnos. Los sindicatos acogieron la noticia con cautela y pidieron que se publiquen las "
    "condiciones de los contratos.",
    "Когда поезд наконец остановился, на платформе почти никого не было. Старик с чемоданом медленно шёл к "
    "выходу, а дежурный смотрел на часы. В городе уже горели фонари, и снег, который шёл весь день, покрыл "
    "крыши и деревья. Анна решила подождать сестру в маленьком кафе напротив вокзала.",
    "日本の多くの家庭では、朝食にご飯と味噌汁を食べる習慣が今も残っている。しかし近年は、パンやコーヒーで簡単"
    "に済ませる人も増えている。調査によると、二十代の約半数が平日の朝に自分で料理をしないと答えた。専門家は、"
    "前の晩に準備しておくことを勧めている。",
    "这本书分为三个部分。第一部分介绍基本概念和常用的符号，第二部分讨论几种算法的复杂度，第三部分给出完整的程"
    "序和实验结果。读者只需要具备高等数学和线性代数的基础知识。每一章的最后都有练习题，答案可以在附录中找到。",
    "O conselho municipal aprovou na terça-feira o plano para recuperar o antigo mercado, fechado há mais de "
    "dez anos. As obras devem começar na primavera e custar cerca de quatro milhões. No piso de cima haverá "
    "uma biblioteca e salas para associações do bairro; no térreo voltarão a vender-se peixe, fruta e flores.",
    "Jeżeli hasło zostało wpisane niepoprawnie trzy razy, konto jest blokowane na piętnaście minut. "
    "Administrator może je odblokować wcześniej w panelu użytkowników. Zaleca się, aby hasło miało co "
    "najmniej dwanaście znaków i nie było używane w innych serwisach. Wszystkie próby logowania są "
    "zapisywane w dzienniku zdarzeń.",
    "Il nonno raccontava spesso di quando, da ragazzo, attraversava le montagne a piedi per vendere il "
    "formaggio nella valle vicina. Partiva prima dell'alba, con il cane e una lanterna, e tornava dopo due "
    "giorni. Diceva che la cosa più difficile non era la neve, ma il silenzio.",
    "De nieuwe versie lost een fout op waardoor bestanden met een spatie in de naam niet werden gevonden. "
    "Ook is het nu mogelijk om meer dan één map tegelijk te doorzoeken. Gebruikers van oudere versies hoeven "
    "hun instellingen niet aan te passen; die worden bij de eerste start vanzelf overgenomen.",
    "서울의 여름은 덥고 습하며 비가 자주 내린다. 특히 칠월에는 장마가 이어져 강물이 불어나고 일부 도로가 "
    "통제되기도 한다. 시는 올해부터 낮은 지역에 사는 주민들에게 휴대전화로 경보를 보내기로 했다. 학교와 "
    "도서관은 대피소로 쓰일 수 있도록 준비되어 있다.",
    "يبدأ الدرس الأول بشرح الحروف وطريقة نطقها، ثم ينتقل إلى الكلمات القصيرة والجمل البسيطة. ويستطيع الطالب "
    "أن يستمع إلى التسجيلات وأن يكتب ملاحظاته في دفتر خاص. وبعد كل ثلاثة دروس اختبار صغير يساعد على معرفة ما "
    "تم تعلمه وما يحتاج إلى مراجعة.",
    "गाँव के बीच में एक पुराना कुआँ है, जिसके पास शाम को बच्चे खेलते हैं। पिछले साल सरकार ने यहाँ पानी की नई "
    "टंकी बनवाई, इसलिए अब औरतों को दूर नहीं जाना पड़ता। फिर भी बहुत से लोग उसी कुएँ का पानी पीना पसंद करते "
    "हैं, क्योंकि उसका स्वाद उन्हें अच्छा लगता है।",
    "Sunucu başlatıldığında önce veritabanı bağlantısı denenir; bağlantı kurulamazsa işlem bir hata "
    "iletisiyle sona erer. Günlük dosyaları her gece yarısı yenilenir ve otuz günden eski olanlar silinir. "
    "Bu süre ayar dosyasından değiştirilebilir. Değişikliklerin geçerli olması için sunucunun yeniden "
    "başlatılması gerekir.",
    "Mẹ tôi thường dậy từ bốn giờ sáng để nấu cơm và chuẩn bị hàng mang ra chợ. Những ngày mưa, con đường "
    "đất trơn đến mức xe đạp không đi được, bà phải gánh rau đi bộ gần một tiếng đồng hồ. Vậy mà chưa bao "
    "giờ tôi nghe bà than phiền.",
    "Program ini membaca data dari berkas teks dan menghitung rata-rata setiap kolom. Baris yang kosong atau "
    "tidak lengkap akan dilewati, dan jumlahnya dicatat pada akhir laporan. Pengguna dapat memilih pemisah "
    "kolom lain dengan opsi yang sesuai, misalnya titik koma atau tabulasi.",
    "Увечері, коли спека спала, сусіди зібралися на подвір'ї під великим горіхом. Хтось приніс кавун, хтось "
    "хліб і сир, а дід Микола налаштовував стару скрипку. Говорили про врожай, про дітей, які поїхали до "
    "міста, і про те, чи вистачить води в річці до осені.",
    "Kommunen meddelade på måndagen att badplatsen förblir stängd tills nya prov har tagits. Halten av "
    "bakterier var i förra veckan tre gånger högre än tillåtet. Orsaken tros vara ett läckage från en "
    "ledning i närheten, som nu ska grävas upp och bytas ut.",
    "Při překladu je nutné zachovat všechny značky i jejich pořadí. Pokud se řetězec v programu nepoužívá, "
    "označí se jako zastaralý a při další aktualizaci se odstraní. Neúplné překlady nejsou chybou: místo "
    "nich se zobrazí původní text v angličtině.",
    "Η βιβλιοθήκη του χωριού άνοιξε ξανά μετά από πέντε χρόνια, χάρη στους εθελοντές που επισκεύασαν τη "
    "στέγη και έβαψαν τους τοίχους. Τα παιδιά μπορούν να δανείζονται δύο βιβλία την εβδομάδα, ενώ κάθε "
    "Σάββατο διαβάζονται παραμύθια. Η είσοδος είναι ελεύθερη για όλους.",
)

QUESTIONS = (
    "Explain how a suspension bridge carries its load, step by step, and give a small example with numbers.",
    "Write a Python class that caches the results of slow queries on disk, with tests, and explain your choices.",
    "My landlord keeps the deposit because of a scratch on the floor. What can I do? Please draft a polite letter.",
    'Translate this into French and Spanish: "The meeting was moved to Thursday because the room was not free."',
    "Write a C function that reads a CSV file line by line, and say what can go wrong with quoted fields.",
    "Summarise the causes of the First World War in a table, then name three books for further reading.",
    "A train leaves at 9:40 and travels 210 km at 84 km/h. When does it arrive? Show each step.",
    "Tell me a story about a lighthouse keeper who finds a letter in a bottle. Make it about three paragraphs long.",
    "What is the difference between TCP and UDP, and when would you use each? Answer with a list.",
    "Write a shell script that backs up a folder every night and keeps the seven newest archives.",
    "Give me a week of vegetarian dinners with a shopping list sorted by the sections of a supermarket.",
    "Review this SQL and make it faster: SELECT * FROM orders o, customers c WHERE o.cid = c.id AND c.city = 'Bonn';",
    "Wie funktioniert eine Wärmepumpe, und wann lohnt sie sich in einem alten Haus? Bitte mit einem Rechenbeispiel.",
    "Explique-moi la différence entre une liste et un dictionnaire en Python, avec un court exemple commenté.",
    "¿Qué lugares recomiendas visitar en tres días en Lima, y cómo me muevo entre ellos?",
    "Напиши короткое письмо коллеге с просьбой перенести встречу и предложи два других времени.",
    "東京から京都まで安く行く方法を三つ教えて、それぞれの長所と短所を説明してください。",
    "请用简单的话解释什么是递归，并写一个计算阶乘的程序。",
    "Como faço pão em casa sem máquina? Diga as quantidades e o tempo de cada passo.",
    "Jak przygotować się do rozmowy kwalifikacyjnej na stanowisko programisty? Podaj listę pytań.",
)
